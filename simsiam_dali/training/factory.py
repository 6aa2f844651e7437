"""From the config to the parts of a run: encoder, loss, optimizer, loaders. The one place that knows them all."""

import dataclasses
from pathlib import Path
from typing import Literal

import torch

from simsiam_dali.common import shipped
from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.schema import Config
from simsiam_dali.data.graph import Graph, LogMel, Source
from simsiam_dali.data.loader import Loader
from simsiam_dali.data.quarantine import Quarantine
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.models.encoder import Encoder
from simsiam_dali.models.registry import LossFn, encoder_type


def create_encoder(config: Config, pretrained: bool = True) -> Encoder:
    """The encoder named by `encoder.encoder_type`, on the CPU.

    pretrained: False leaves `pretrained_backbone` unread, for an encoder whose weights come from a checkpoint.
    """
    return encoder_type(config).create(config, pretrained)


def create_loss_fn(config: Config, shards: ShardSet, device: torch.device) -> LossFn:
    """The loss that goes with the encoder; `shards` has the tags it may learn from."""
    return encoder_type(config).create_loss_fn(config, shards, device)


def create_optimizer(config: Config, encoder: Encoder) -> torch.optim.Optimizer:
    """The optimizer over the encoder's groups; each group's `fix_lr` is what `learning_rates` goes by."""
    rule = encoder_type(config).settings(config)
    groups = encoder.param_groups()
    if rule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=rule.weight_decay, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=rule.sgd_momentum, weight_decay=rule.weight_decay, fused=True)


def log_mel_settings(config: Config) -> LogMel:
    """The mel front end; its mean and std are still to be measured."""
    simsiam = config.encoder.simsiam
    return LogMel(config.data.sample_rate, simsiam.n_fft, simsiam.hop_length, simsiam.n_mels)


def view_seconds(config: Config, shards: ShardSet) -> float:
    """Length of a view, s. Raises UserError when the shards or the augmentations do not allow it."""
    seconds = config.data.view_seconds or shards.segment_seconds
    if seconds > shards.segment_seconds:
        raise UserError(
            f"data.view_seconds is {seconds:g}, but {shards.place} holds segments of {shards.segment_seconds:g} s:"
            " use a shorter view, or pack with a longer --segment-seconds"
        )
    kind, spec, augmentation = encoder_type(config), log_mel_settings(config), config.encoder.simsiam.augmentation
    frames = spec.frames(seconds)
    if seconds * spec.sample_rate < kind.min_samples:
        raise UserError(
            f"data.view_seconds is {seconds:g}, but {config.encoder.encoder_type} needs"
            f" {kind.min_samples / spec.sample_rate:.2f} s at {spec.sample_rate} Hz or more"
        )
    if kind.batches == "views" and augmentation.spec_augment and augmentation.time_mask_param >= frames:
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
    """The data graph over one split, this rank's part of it, in micro-batches.

    shuffled: training order, whole steps only; otherwise the stored order, once. Raises UserError when the split
    is empty, a batch is larger than it, or too much of the set is in its quarantine.
    """
    if not shards.count(split):
        raise UserError(f"{shards.place} holds no {split} segments: pack again with another --val-fraction")
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
        raise ValueError("data.threads is still auto: `tuning.with_threads` chooses a number first")
    micro_batch = config.train.micro_batch_of(config.encoder.batch_size)
    return Loader(
        graph,
        count=shards.count(split),
        batch_size=micro_batch,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        seed=config.train.seed,
        gpu=world.gpu,
        quarantine=Quarantine(shards, config.data.max_bad_fraction),
        group=config.encoder.batch_size // micro_batch,
    )


def with_statistics(log_mel: LogMel, mean: float, std: float) -> LogMel:
    """The front end with the data set's mean and std, dB."""
    return dataclasses.replace(log_mel, mean=mean, std=std)


def default_config_file(device: torch.device) -> Path:
    """`configs/gpu.yaml` holds the plan's values; `configs/cpu.yaml` is sized for two cores and 8 GB."""
    return shipped.folder("configs") / ("gpu.yaml" if device.type == "cuda" else "cpu.yaml")
