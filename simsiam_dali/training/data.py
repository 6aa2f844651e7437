"""From the config and the shards to batches: the mel front end, the length of a view, the loader and its threads."""

import dataclasses
import itertools
import os
import statistics
import time
from dataclasses import dataclass
from typing import Literal, Self

from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import replace_settings
from simsiam_dali.config.schema import Config
from simsiam_dali.data.format import Split
from simsiam_dali.data.graph import GraphConfig, LogMel, Source
from simsiam_dali.data.loader import Loader, measure_log_mel, release_memory
from simsiam_dali.data.quarantine import Quarantine
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training.checkpoint import Checkpoint

TIMED_BATCHES = 8
"""Batches timed for each number of threads; the first, which builds the graph and fills the queue, is not."""

Mode = Literal["views", "clean", "raw"]


@dataclass(frozen=True)
class TrainingData:
    """What a run reads: the shards, the log-mel statistics measured on them, and the loader of the training split.

    config: with `data.threads` and `data.prefetch` as numbers.
    """

    config: Config
    shards: ShardSet
    world: World
    log_mel: LogMel
    loader: Loader

    @classmethod
    def open(cls, config: Config, shards: ShardSet, world: World, resumed: Checkpoint | None) -> Self:
        """Choose the threads, measure the log-mel's mean and std (or take those of the checkpoint), open the loader."""
        log_mel, mode = log_mel_settings(config), encoder_type(config).batches
        if config.data.threads == "auto":
            config = with_threads(config, shards, log_mel, world)
            world.print(f"measured: {config.data.threads} DALI threads, {config.data.prefetch} batches ahead")
        if resumed:
            log_mel = with_statistics(log_mel, **resumed["log_mel"])
        elif mode == "views":
            everything = World(0, 1, world.device)  # all ranks measure the same segments
            clean = create_loader(config, shards, log_mel, everything, "train", "clean")
            log_mel = measure_log_mel(clean, config.data.stats_segments)
            del clean
        loader = create_loader(config, shards, log_mel, world, "train", mode, shuffled=True)
        release_memory()  # of the graphs that measured
        return cls(config, shards, world, log_mel, loader)

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return self.loader.steps // self.micro_batches

    @property
    def micro_batches(self) -> int:
        """Batches of the loader whose gradients make one step."""
        size = self.config.encoder.batch_size
        return size // self.config.train.micro_batch_of(size)

    @property
    def batch_size(self) -> int:
        """Segments in a step, over all ranks."""
        return self.config.encoder.batch_size * self.world.size

    @property
    def epoch_complete(self) -> bool:
        """Whether the loader has given all batches of this epoch."""
        return self.loader.step == self.loader.steps

    def create_loader(self, split: Split, mode: Mode) -> Loader:
        """An ordered loader of a split: every segment once."""
        return create_loader(self.config, self.shards, self.log_mel, self.world, split, mode)


def log_mel_settings(config: Config) -> LogMel:
    """The mel front end; its mean and std are still to be measured."""
    simsiam = config.encoder.simsiam
    return LogMel(config.data.sample_rate, simsiam.n_fft, simsiam.hop_length, simsiam.n_mels)


def with_statistics(log_mel: LogMel, mean: float, std: float) -> LogMel:
    """The front end with the data set's mean and std, dB."""
    return dataclasses.replace(log_mel, mean=mean, std=std)


def view_seconds(config: Config, shards: ShardSet) -> float:
    """Length of a view, s. Raises UserError when the shards or the augmentations do not allow it."""
    seconds = config.data.view_seconds or shards.segment_seconds
    if seconds > shards.segment_seconds:
        raise UserError(
            f"data.view_seconds is {seconds:g}, but {shards.location} holds segments of {shards.segment_seconds:g} s:"
            " use a shorter view, or pack with a longer --segment-seconds"
        )
    kind, spec, augmentation = encoder_type(config), log_mel_settings(config), config.encoder.simsiam.augmentation
    frames = spec.frames(seconds)
    if seconds * spec.sample_rate < kind.min_samples:
        raise UserError(
            f"data.view_seconds is {seconds:g}, but {config.encoder.encoder_type} needs"
            f" {kind.min_samples / spec.sample_rate:.2f} s at {spec.sample_rate} Hz or more"
        )
    if (
        kind.batches == "views"
        and augmentation.spec_augment
        and augmentation.time_mask_prob
        and augmentation.time_mask_param >= frames
    ):
        raise UserError(
            f"encoder.simsiam.augmentation.time_mask_param is {augmentation.time_mask_param}, but a view of"
            f" {seconds:g} s has only {frames} frames: use a smaller mask or a longer view"
        )
    return seconds


def seconds_of_views(config: Config, shards: ShardSet) -> float:
    """The length of all views of a segment together, s."""
    data = config.data
    return data.views * view_seconds(config, shards) + data.short_views * data.short_view_seconds


def create_loader(
    config: Config, shards: ShardSet, log_mel: LogMel, world: World, split: Split, mode: Mode, shuffled: bool = False
) -> Loader:
    """The data graph over this rank's part of one split, in micro-batches.

    shuffled: training order, whole steps only; otherwise the stored order, once. Raises UserError when the split
    is empty, a batch is larger than it, or too much of the set is in its quarantine.
    """
    if not shards.count(split):
        raise UserError(f"{shards.location} holds no {split} segments: pack again with another --val-fraction")
    source = Source(
        tars=tuple(shards.tars(split)),
        indexes=tuple(shards.indexes(split)),
        codec=shards.codec,
        native_rate=shards.sample_rate != config.data.sample_rate,
        segment_seconds=shards.segment_seconds,
        shard_id=world.rank,
        num_shards=world.size,
        shuffle_buffer=config.data.shuffle_buffer if shuffled else 0,
    )
    seconds, short = view_seconds(config, shards), config.data.short_view_seconds
    if mode == "views" and config.data.short_views and short > seconds:
        raise UserError(f"data.short_view_seconds is {short:g}, but the other views have {seconds:g} s: use less")
    graph = GraphConfig(
        source=source,
        log_mel=log_mel,
        mode=mode,
        seconds=seconds,
        augmentation=config.encoder.simsiam.augmentation,
        crops=config.data.view_crops,
        views=config.data.views,
        short_views=config.data.short_views,
        short_seconds=short,
    )
    if config.data.threads == "auto":
        raise ValueError("data.threads is still auto: `with_threads` chooses a number first")
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


def with_threads(config: Config, shards: ShardSet, log_mel: LogMel, world: World) -> Config:
    """The config with `data.threads: auto` and `data.prefetch` replaced by numbers, chosen by a short measurement.

    Starts with this process's share of the cores, and halves it while the training loader stays within 5% of the
    fastest; the last number that does is taken, the same on all ranks. Mostly two numbers are tried. As many batches
    ahead as the slowest timed batch takes median ones, from 2 to 4, so that an uneven loader does not stall the model.
    The result changes the speed, never the batches.
    """
    if config.data.threads != "auto":
        return config
    # Of the rank that has the fewest: all ranks make the same trials.
    cores = min(world.gather(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))
    mode = encoder_type(config).batches

    def seconds_of_batches(threads: int) -> list[float]:
        trial = replace_settings(config, data__threads=threads)
        loader = create_loader(trial, shards, log_mel, world, "train", mode, shuffled=True)
        stamps = [time.perf_counter() for _ in itertools.islice(loader.endless(), TIMED_BATCHES + 1)]
        del loader
        release_memory()  # or each number of threads is tried beside the graphs of those before
        return [b - a for a, b in itertools.pairwise(stamps)]

    threads, taken = cores, seconds_of_batches(cores)
    fastest = sum(taken)
    while threads > 1:
        seconds = seconds_of_batches(threads // 2)
        fastest = min(fastest, sum(seconds))
        # Together: a rank that went on alone would measure on cores that the others have left free.
        if max(world.gather(sum(seconds) > 1.05 * fastest)):
            break
        threads, taken = threads // 2, seconds
    ahead = round(max(taken) / statistics.median(taken))
    return replace_settings(config, data__threads=threads, data__prefetch=min(4, max(2, ahead)))
