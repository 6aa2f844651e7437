"""From the config to the parts of a run: encoder, loss, optimizer, loaders. The one place that knows them all."""

import dataclasses
import itertools
import os
import statistics
import time
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from simsiam_dali.config import Config
from simsiam_dali.data.loader import Loader
from simsiam_dali.data.pipeline import Graph, LogMel, Source
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.distributed import World
from simsiam_dali.errors import UserError
from simsiam_dali.models.losses import SimSiamLoss
from simsiam_dali.models.simsiam import SimSiam


def create_encoder(config: Config, pretrained: bool = True) -> SimSiam:
    """The encoder named by `encoder.encoder_type`, on the CPU.

    pretrained: False leaves `pretrained_backbone` unread, for an encoder whose weights come from a checkpoint.
    """
    simsiam = config.encoder.simsiam
    return SimSiam(
        backbone=simsiam.backbone,
        projection_dim=simsiam.projection_dim,
        projection_layers=simsiam.projection_layers,
        predictor_hidden_dim=simsiam.predictor_hidden_dim,
        pretrained=pretrained and simsiam.pretrained_backbone,
        embedding=simsiam.embedding,
    )


def create_loss_fn(config: Config) -> nn.Module:  # noqa: ARG001  (the type decides, and there is one so far)
    """The loss that goes with the encoder."""
    return SimSiamLoss()


def create_optimizer(config: Config, encoder: SimSiam) -> torch.optim.Optimizer:
    """The optimizer over the encoder's groups; each group's `fix_lr` is what `learning_rates` goes by."""
    simsiam = config.encoder.simsiam
    groups = encoder.param_groups()
    for group in groups:
        group["fix_lr"] = group["fix_lr"] and simsiam.fix_predictor_lr
    if simsiam.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=simsiam.weight_decay, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=simsiam.sgd_momentum, weight_decay=simsiam.weight_decay, fused=True)


def log_mel_settings(config: Config) -> LogMel:
    """The mel front end; its mean and std are still to be measured."""
    simsiam = config.encoder.simsiam
    return LogMel(config.data.sample_rate, simsiam.n_fft, simsiam.hop_length, simsiam.n_mels)


def view_seconds(config: Config, shards: ShardSet) -> float:
    """Length of a view, s. Raises UserError when the shards or the augmentations do not allow it."""
    seconds = config.data.view_seconds or shards.segment_seconds
    if seconds > shards.segment_seconds:
        raise UserError(
            f"data.view_seconds is {seconds:g}, but {shards.root} holds segments of {shards.segment_seconds:g} s:"
            " use a shorter view, or pack with a longer --segment-seconds"
        )
    frames, augmentation = log_mel_settings(config).frames(seconds), config.encoder.simsiam.augmentation
    if augmentation.spec_augment and augmentation.time_mask_param >= frames:
        raise UserError(
            f"encoder.simsiam.augmentation.time_mask_param is {augmentation.time_mask_param}, but a view of"
            f" {seconds:g} s has only {frames} frames: use a smaller mask or a longer view"
        )
    return seconds


def create_loader(
    config: Config,
    shards: ShardSet,
    log_mel: LogMel,
    world: World,
    split: Literal["train", "val"],
    mode: Literal["views", "clean", "raw"],
    shuffled: bool = False,
) -> Loader:
    """The data graph over one split, this rank's part of it.

    shuffled: training order, reading on without end; otherwise the stored order, once. Raises UserError when the split
    is empty or a batch is larger than it.
    """
    if not shards.count(split):
        raise UserError(f"{shards.root} holds no {split} segments: pack again with another --val-fraction")
    rate = config.data.sample_rate
    source = Source(
        tars=tuple(shards.tars(split)),
        indexes=tuple(shards.indexes(split)),
        codec=shards.codec,
        native_rate=shards.sample_rate != rate,
        segment_seconds=shards.segment_seconds,
        shard_id=world.rank,
        num_shards=world.size,
        shuffle_buffer=config.data.shuffle_buffer if shuffled else 0,
    )
    graph = Graph(
        source=source,
        log_mel=log_mel,
        mode=mode,
        seconds=view_seconds(config, shards),
        augmentation=config.encoder.simsiam.augmentation,
        crops=config.data.view_crops,
    )
    if config.data.threads == "auto":
        raise ValueError("data.threads is still auto: `with_threads` chooses a number first")
    return Loader(
        graph,
        count=shards.count(split),
        batch_size=config.encoder.batch_size,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        seed=config.train.seed,
        gpu=world.gpu,
    )


def with_statistics(log_mel: LogMel, mean: float, std: float) -> LogMel:
    """The front end with the data set's mean and std, dB."""
    return dataclasses.replace(log_mel, mean=mean, std=std)


def with_threads(config: Config, shards: ShardSet, log_mel: LogMel, world: World) -> Config:
    """The config with `data.threads: auto` made a number, and `data.prefetch` with it, by a short measurement.

    Takes the fewest threads whose training loader comes within 5% of the fastest, doubling up to this process's share
    of the cores; and as many batches ahead as the slowest of the timed batches takes median ones, from 2 to 4, so that
    an uneven loader does not stall the model. The result changes the speed, never the batches.
    """
    if config.data.threads != "auto":
        return config
    cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    tried: dict[int, list[float]] = {}  # threads -> seconds of each batch
    for threads in sorted({min(2**n, cores) for n in range(cores.bit_length() + 1)}):
        trial = _with_data(config, threads=threads)
        loader = create_loader(trial, shards, log_mel, world, "train", "views", shuffled=True)
        stamps = [time.perf_counter() for _ in itertools.islice(loader.endless(), TUNING_BATCHES + 1)]
        tried[threads] = [b - a for a, b in itertools.pairwise(stamps)]
    fastest = min(map(sum, tried.values()))
    threads = min(n for n, seconds in tried.items() if sum(seconds) <= 1.05 * fastest)
    ahead = round(max(tried[threads]) / statistics.median(tried[threads]))
    return _with_data(config, threads=threads, prefetch=min(4, max(2, ahead)))


def _with_data(config: Config, **values: int) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=values)})


TUNING_BATCHES = 8
"""Batches timed for each number of threads; the first, which builds the graph and fills the queue, is left out."""


def default_config_file(device: torch.device) -> Path:
    """`configs/gpu.yaml` holds the plan's values; `configs/cpu.yaml` is sized for two cores and 8 GB."""
    name = "gpu.yaml" if device.type == "cuda" else "cpu.yaml"
    return Path(__file__).resolve().parent.parent / "configs" / name
