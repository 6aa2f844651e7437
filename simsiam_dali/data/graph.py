"""What shapes the DALI graph: the log-mel front end, the shards that are read, and the kind of output."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simsiam_dali.config.schema import AugmentationConfig


@dataclass(frozen=True)
class LogMel:
    """The spectrogram's settings, and its mean and std over the data set, in dB."""

    sample_rate: int = 16000  # Hz
    n_fft: int = 2048  # samples
    hop_length: int = 512  # samples
    n_mels: int = 128
    mean: float = 0.0  # dB
    std: float = 1.0  # dB

    def frames(self, seconds: float) -> int:
        """Frames of a view: centred windows, one each hop, the first at time 0."""
        return 1 + round(seconds * self.sample_rate) // self.hop_length


@dataclass(frozen=True)
class Source:
    """Tars with their DALI indexes, and this rank's part of them."""

    tars: tuple[Path | str, ...]  # a str is an address on S3
    indexes: tuple[Path, ...]
    codec: str
    native_rate: bool  # False: the shards are packed at the front end's rate
    segment_seconds: float
    shard_id: int = 0
    num_shards: int = 1
    shuffle_buffer: int = 0  # segments; 0 reads in the stored order


@dataclass(frozen=True)
class Epoch:
    """One pass of the reader is `reader_batches` batches; the first `used` are an epoch, the others are only read."""

    used: int
    reader_batches: int


@dataclass(frozen=True)
class GraphConfig:
    """All settings of the graph. seconds: length of a view. augmentation, crops, views, short_*: for mode "views".

    epoch: which batches are decoded; None decodes all. views: how many augmented views a segment has. short_views: how
    many shorter ones follow them, of short_seconds.
    """

    source: Source
    log_mel: LogMel
    mode: Literal["views", "clean", "raw"]
    seconds: float
    augmentation: AugmentationConfig
    crops: Literal["same", "independent"] = "same"
    epoch: Epoch | None = None
    views: int = 2
    short_views: int = 0
    short_seconds: float = 0.0

    def by_length(self) -> "list[GraphConfig]":
        """The graph of the views, and where there are short ones, the graph of those alone.

        Each short view has a place of its own, anywhere in the segment; its time masks are shorter in proportion.
        """
        long = dataclasses.replace(self, short_views=0)
        if not self.short_views:
            return [long]
        time_mask = round(self.augmentation.time_mask_param * self.short_seconds / self.seconds)
        short = dataclasses.replace(
            long,
            seconds=self.short_seconds,
            views=self.short_views,
            crops="independent",
            augmentation=self.augmentation.model_copy(update={"time_mask_param": time_mask}),
        )
        return [long, short]
