"""Data graphs over tars written by a test, and what they give; among them a sweep, whose frequency tells the place."""

from pathlib import Path
from typing import Any

import numpy as np

from helpers.signals import RATE, Array, frequency
from simsiam_dali.config.schema import AugmentationConfig
from simsiam_dali.data.graph import GraphConfig, LogMel, Source
from simsiam_dali.data.pipeline import PipelineSettings, build

NAMES = ("time_shift", "time_stretch", "pitch_shift", "noise", "gain", "reverb", "frequency_mask", "time_mask",
         "mixup", "crop")  # fmt: skip
OFF = AugmentationConfig(**{f"{name}_prob": 0.0 for name in NAMES})
ALL = AugmentationConfig(**{f"{name}_prob": 1.0 for name in NAMES})
SECONDS = 3.0
FRAMES = LogMel().frames(SECONDS)


def graph(
    shards: tuple[tuple[Path, ...], tuple[Path, ...]],
    mode: Any,
    augmentation: AugmentationConfig = OFF,
    seconds: float = SECONDS,
    segment_seconds: float = SECONDS,
    codec: str = "flac",
    native_rate: bool = False,
    spec: LogMel | None = None,
    **more: Any,
) -> GraphConfig:
    source = Source(*shards, codec, native_rate, segment_seconds, shuffle_buffer=more.pop("shuffle_buffer", 0))
    return GraphConfig(source, spec or LogMel(), mode, seconds, augmentation, **more)


def outputs(
    graph: GraphConfig, batch_size: int, seed: int = 0, gpu: int | None = None, batches: int = 1
) -> list[Array]:
    """The outputs of some batches, one after the other: each output `(batches * batch_size, ...)`."""
    pipeline = build(graph, PipelineSettings(batch_size, threads=2, prefetch=1, seed=seed, gpu=gpu))
    runs = [[np.array(x.as_cpu().as_array()) for x in pipeline.run()[:-2]] for _ in range(batches)]
    whole = [np.concatenate(parts) for parts in zip(*runs, strict=True)]
    return whole if graph.mode == "raw" else [*(x.transpose(0, 2, 1) for x in whole[:-1]), whole[-1]]


LOW, HIGH, LONG, SHORT = 500.0, 7500.0, 20.0, 1.0


def sweep() -> Array:
    """A tone that rises steadily from LOW to HIGH over LONG seconds: its frequency tells the place."""
    time = np.arange(round(LONG * RATE)) / RATE
    return (0.5 * np.sin(2 * np.pi * (LOW * time + (HIGH - LOW) * time**2 / (2 * LONG)))).astype(np.float32)


def places(views: Array) -> Array:
    """The place of each view's middle in the sweep, s."""
    return np.array([(frequency(view) - LOW) / (HIGH - LOW) * LONG for view in views])


def crops(shards: Any, mode: Any, **more: Any) -> GraphConfig:
    return graph(shards, mode, seconds=SHORT, segment_seconds=LONG, **more)
