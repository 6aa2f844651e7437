"""The DALI graph: read -> decode -> crop -> resample -> augmented views, or one clean view, or the waveform.

One definition serves both devices: with `gpu`, everything after the decoder (which DALI has for the CPU only) runs on
the GPU; without it no GPU is touched.
"""

import itertools
import os
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from simsiam_dali.data import augment
from simsiam_dali.data.dali import DataNode, OperatorConcurrency, Pipeline, fn, pipeline_def, types
from simsiam_dali.data.graph import Epoch, GraphConfig, Source
from simsiam_dali.data.views import augmented_views, clean_view, crop, noise_bank, to_front_end_rate

NEW_THREAD_POOL = "DALI_USE_NEW_THREAD_POOL"
"""Read by DALI when the first pipeline of a process is built."""


@dataclass(frozen=True)
class PipelineSettings:
    """How the graph runs. gpu: CUDA device number, None for the CPU alone."""

    batch_size: int
    threads: int
    prefetch: int  # batches
    seed: int  # the same on all ranks, which have to agree on the reader's order; the draws' seed is derived by rank
    gpu: int | None


def build(graph: GraphConfig, settings: PipelineSettings, state: str | None = None) -> Pipeline:
    """Build the pipeline. Outputs: [each view, row, total, samples] in mode "views", [view or wave, ...] otherwise.

    Views are `(T, n_mels)`, time first. total, on the CPU: a number of each decoded segment that is finite only if
    all of the segment is. samples, on the CPU, INT32: its length as it was decoded; 0 in a batch outside `graph.epoch`,
    whose data is of size 1. state: a `pipeline.checkpoint()` to continue from.
    """
    pipeline = define(graph, settings, state)
    build_on_new_pool(pipeline)
    return pipeline


def build_on_new_pool(pipeline: Pipeline) -> None:
    """Build a pipeline on DALI's new thread pool, where operators of two batches share the threads.

    With the old one (DALI 2.4's default) operators run one by one whatever `concurrency` is: a pitch shift drawn by a
    single sample of the batch keeps one core busy and the others idle; on a GPU the cores are idle although the next
    batch could already be decoded. `DALI_USE_NEW_THREAD_POOL=0` keeps the old one.
    """
    os.environ.setdefault(NEW_THREAD_POOL, "1")
    # DALI writes a notice for each pipeline directly to file descriptor 2; other output there is passed on.
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            pipeline.build()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            os.write(2, written.read().replace(b"\n!!! Forced use of NewThreadPool !!!\n", b""))


def define(graph: GraphConfig, settings: PipelineSettings, state: str | None = None) -> Pipeline:
    """The pipeline of `build` before it is built, which needs neither the shards nor a GPU."""
    on_gpu = settings.gpu is not None
    noise = noise_bank(graph, settings.seed) if graph.mode == "views" else None
    parts = graph.by_length()  # here: DALI would convert it to operators, and warn that it cannot

    @pipeline_def(
        batch_size=settings.batch_size,
        num_threads=settings.threads,
        device_id=settings.gpu,
        prefetch_queue_depth=settings.prefetch,
        enable_conditionals=True,
        enable_checkpointing=True,
        exec_dynamic=True,
        concurrency=OperatorConcurrency.FULL,
    )
    def pipeline() -> tuple[DataNode, ...]:
        encoded, row = read(graph.source, settings.seed)
        random = draw(graph, parts, augment.derive_seed(settings.seed, f"rank {graph.source.shard_id}"))
        if graph.epoch is None:  # noqa: SIM114 - a condition of Python, and then one of the graph
            outputs = decode(encoded, random, graph, parts, noise, on_gpu)
        elif is_used(graph.epoch, settings.batch_size):
            outputs = decode(encoded, random, graph, parts, noise, on_gpu)
        else:
            outputs = not_decoded(graph, on_gpu)
        *data, total, samples = outputs
        return (*data, row, total, samples)

    return pipeline(checkpoint=state)


def read(source: Source, seed: int) -> tuple[DataNode, DataNode]:
    """Encoded audio (uint8) and the segment's row, int64 (1,).

    The reader passes over the whole source before it starts again; the last batch of a pass is padded with its last
    segment, and every rank has as many batches.
    """
    shuffled = source.shuffle_buffer > 0
    order = {
        "random_shuffle": True,
        "initial_fill": source.shuffle_buffer,
        "shuffle_after_epoch": True,
        "shuffle_after_epoch_seed": augment.derive_seed(seed, "shard order"),
        "seed": augment.derive_seed(seed, "reader"),
    }
    segments: Any = fn.readers.webdataset(  # two outputs, as `ext` names two
        name="reader",
        paths=[str(p) for p in source.tars],
        index_paths=[str(p) for p in source.indexes],
        ext=[source.codec, "row"],
        dtypes=[types.UINT8, types.INT64],
        missing_component_behavior="error",
        dont_use_mmap=True,  # a truncated mapped tar, or one on a failing disk, ends the process with SIGBUS
        shard_id=source.shard_id,
        num_shards=source.num_shards,
        pad_last_batch=True,
        **(order if shuffled else {"stick_to_shard": True}),
    )
    return segments


Random = tuple[list[DataNode | float], list[augment.Draws]]
"""Where each crop starts, 0 to 1, one for each view or one for all; in mode "views" each view's augmentations."""


def draw(graph: GraphConfig, parts: list[GraphConfig], seed: int) -> list[Random]:
    """The random numbers of a batch, for each of `parts`, `graph.by_length()`; seed: of this rank.

    Drawn whether or not the batch is decoded: every batch draws equally often.
    """

    def draw_crop(name: str) -> DataNode:
        return augment.uniform(0.0, 1.0, augment.derive_seed(seed, name))

    if graph.mode != "views":
        return [([0.5 if graph.source.shuffle_buffer == 0 else draw_crop("crop")], [])]
    random: list[Random] = []
    number = itertools.count(1)
    for part in parts:
        numbers = list(itertools.islice(number, part.views))
        crops = [draw_crop(f"crop {n}") for n in (numbers if part.crops == "independent" else numbers[:1])]
        frames = part.log_mel.frames(part.seconds)
        seeds = [augment.derive_seed(seed, f"view {n}") for n in numbers]
        random.append((crops, [augment.draw(part.augmentation, frames, part.log_mel.n_mels, own) for own in seeds]))
    return random


def is_used(epoch: Epoch, batch_size: int) -> DataNode:
    """BOOL, the same for a whole batch: whether it belongs to an epoch. Part of the pipeline's checkpoint."""
    return fn.external_source(
        source=lambda batch: np.full(batch_size, batch % epoch.reader_batches < epoch.used), dtype=types.BOOL, ndim=0
    )


def decode(
    encoded: DataNode,
    random: list[Random],
    graph: GraphConfig,
    parts: list[GraphConfig],
    noise: np.ndarray | None,
    on_gpu: bool,
) -> tuple[DataNode, ...]:
    """The data of the mode, time before frequency, then total and samples. parts: `graph.by_length()`."""
    wave, rate = fn.decoders.audio(encoded, dtype=types.FLOAT, downmix=True)
    samples = wave.shape(dtype=types.INT32)[0]
    # FLAC holds integers: what decodes is finite, which saves a pass over the samples.
    total = fn.cast(samples, dtype=types.FLOAT) if graph.source.codec == "flac" else fn.reductions.sum(wave)
    if not graph.source.native_rate:
        rate = types.Constant(np.float32(graph.log_mel.sample_rate), device="cpu")
    if on_gpu:
        wave = wave.gpu()

    def wave_of(at: DataNode | float, part: GraphConfig) -> DataNode:
        return to_front_end_rate(crop(wave, rate, part, at), rate, part, on_gpu)

    if graph.mode != "views":
        (((at,), _),) = random
        one = wave_of(at, graph)
        return one if graph.mode == "raw" else clean_view(one, graph.log_mel), total, samples
    waves = [[wave_of(at, part) for at in crops] for part, (crops, _) in zip(parts, random)]  # noqa: B905 - DALI's zip
    # One bank for all views: DALI keeps a copy of a constant for each sample of the batch. And here, after the crops:
    # DALI names operators by their order, and finds their states in a checkpoint by name.
    bank = None if noise is None else types.Constant(noise, device="gpu" if on_gpu else "cpu")
    views = []
    for part, own, (_, draws) in zip(parts, waves, random):  # noqa: B905 - DALI's zip
        of_each = own if len(own) == part.views else own * part.views
        views += augmented_views(of_each, draws, bank, part, on_gpu)
    return (*views, total, samples)


def not_decoded(graph: GraphConfig, on_gpu: bool) -> tuple[DataNode, ...]:
    """Placeholders for the data, total and samples of a batch that is not decoded."""
    size = (1,) if graph.mode == "raw" else (1, 1)
    data = types.Constant(np.zeros(size, np.float32), device="gpu" if on_gpu else "cpu")
    total = types.Constant(np.float32(0), device="cpu")
    samples = types.Constant(np.int32(0), device="cpu")
    return (*[data] * (graph.views + graph.short_views if graph.mode == "views" else 1), total, samples)
