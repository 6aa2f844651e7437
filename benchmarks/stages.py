"""The stages of this project: prefixes of its data graph, its training step, and both together.

| stage | what one sample costs in it |
|---|---|
| loader/read | the reader alone: encoded audio out of the tars |
| loader/decode | + DALI's decoder, always on the CPU |
| loader/resample | + conversion to the front end's rate (none where the shards are at it), cut to the view's length |
| loader/mel | + one log-mel, as in validation and embedding |
| loader/light | two log-mels with shift, gain, noise and SpecAugment |
| loader/all | two log-mels with all eight augmentations |
| loader/train | the loader as the training's config asks for it: its view's length, mel bins, batch and threads |
| model | forward, backward and step of the training's config, on a batch that already is on the device |
| train | loader/train and model as the trainer runs them |
| pack | tools/make_shards.py on the songs that the shards were packed from; a sample is a segment written |
| baseline/train | the same model on the batches of baseline/full |
| baseline/gpu_train | the same model on the batches of baseline/gpu_full |
"""

import contextlib
import io
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from baselines import BASELINES
from measure import Stage, gpu_bytes_in_use
from torch import Tensor

from simsiam_dali.common.distributed import World, choose_device
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import Config
from simsiam_dali.data.dali import DataNode, OperatorConcurrency, fn, pipeline_def, types
from simsiam_dali.data.graph import Source
from simsiam_dali.data.loader import Batch
from simsiam_dali.data.pipeline import build_on_new_pool, read
from simsiam_dali.data.shards import ShardSet, open_shards
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.packing.pack import pack
from simsiam_dali.packing.pack_song import PackSettings
from simsiam_dali.training import micro_batch
from simsiam_dali.training.data import create_loader, log_mel_settings, view_seconds, with_statistics
from simsiam_dali.training.learner import Learner, groups, learning_rates
from simsiam_dali.training.throughput import StepClock

LOADER = ("loader/read", "loader/decode", "loader/resample", "loader/mel", "loader/light", "loader/all")
TRAINING = ("loader/train", "model", "train")

BASELINE_OF_TRAIN = {"baseline/train": "baseline/full", "baseline/gpu_train": "baseline/gpu_full"}
"""Stages that train on a baseline's batches."""

MODES: dict[str, Literal["raw", "clean"]] = {"loader/resample": "raw", "loader/mel": "clean"}

LIGHT = {f"encoder.simsiam.augmentation.{name}_prob": 0.0 for name in ("time_stretch", "pitch_shift", "reverb")}
"""Augmentations that loader/light and its baseline leave out."""

MEAN_DB, STD_DB = -20.0, 20.0
"""Statistics of the log-mel, which the trainer measures; no speed depends on them."""


@dataclass(frozen=True)
class Spec:
    """A stage to open. `config` holds the shards, batch, threads and view's length; `workers` are a DataLoader's."""

    kind: str
    config: Config
    device: str  # cpu or gpu
    workers: int


def open_stage(spec: Spec) -> Stage:
    """Open the stage in this process. Raises UserError as the trainer would."""
    device = choose_device(spec.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    before = gpu_bytes_in_use(device)
    stage = _open(spec, World(0, 1, device))
    stage.gpu_bytes = gpu_bytes_in_use(device) - before
    return stage


def _open(spec: Spec, world: World) -> Stage:
    config, shards = spec.config, open_shards(spec.config.data.shards)
    log_mel = with_statistics(log_mel_settings(config), MEAN_DB, STD_DB)
    if spec.kind in TRAINING:
        config = micro_batch.choose_by_estimate(config, shards, world)
    if spec.kind.startswith("baseline/"):
        baseline = BASELINES[BASELINE_OF_TRAIN.get(spec.kind, spec.kind)]
        batches = baseline.batches(config, shards, log_mel, world.device, spec.workers)
        if spec.kind in BASELINE_OF_TRAIN:
            if encoder_type(config).batches != "views":
                raise UserError(f"{spec.kind} gives views, which {config.encoder.encoder_type} does not take")
            stage = trained(
                config, shards, world, batches, steps=max(1, shards.count("train") // config.encoder.batch_size)
            )
        else:
            stage = Stage((batch.segment for batch in batches), world.device)
        stage.unit = spec.workers  # they give a batch each in turn
        stage.bytes_to_device = baseline.bytes_to_device(shards, log_mel, view_seconds(config, shards), world.device)
        return stage
    if spec.kind in ("loader/read", "loader/decode"):
        front = Front(config, shards, decode=spec.kind == "loader/decode")
        return Stage(iter(front), decoded=lambda: front.decoded)
    if spec.kind == "pack":
        return Stage(packings(shards, spec.workers))
    if spec.kind == "model":
        batch = random_batch(config, shards, world.device)
        return trained(config, shards, world, itertools.repeat(batch), steps=100)
    if spec.kind == "loader/light":
        config = load_config(base=config.model_dump(mode="json"), command_line=LIGHT)
    mode: Literal["views", "clean", "raw"]
    mode = encoder_type(config).batches if spec.kind in TRAINING else MODES.get(spec.kind, "views")
    loader = create_loader(config, shards, log_mel, world, "train", mode, shuffled=True)
    if spec.kind == "train":
        stage = trained(
            config, shards, world, loader.endless(), max(1, shards.count("train") // config.encoder.batch_size)
        )
    else:
        stage = Stage((batch.segment for batch in loader.endless()), world.device)
    stage.decoded = lambda: loader.decoded
    if world.gpu is None:
        stage.unit = max(stage.unit, config.data.prefetch)  # that many batches are made side by side
    else:
        stage.bytes_to_device = decoded_bytes(shards)
    return stage


def packings(shards: ShardSet, workers: int) -> Iterator[Tensor]:
    """Pack the shards' songs again and again, from nothing."""
    songs = Path(shards.manifest.music)
    if not songs.is_dir():
        raise UserError(f"the songs of {shards.root} are no longer in {songs}: name a folder with --music")
    while True:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            counts = pack(songs, Path(folder), PackSettings(**shards.manifest.settings), workers, replace=True).counts
        yield torch.arange(counts["train_segments"] + counts["val_segments"])


def decoded_bytes(shards: ShardSet) -> int:
    """Float32 bytes of a segment at the shards' own rate: what the graph sends to a GPU, once for both views."""
    return round(4 * shards.segment_seconds * float(shards.segments["sample_rate"].mean()))


class Front:
    """The graph's own reader, and its decoder when `decode`; nothing leaves the CPU.

    Iterates over the rows `(B,)` of batch after batch. decoded: segments that have passed the decoder, or the reader
    where there is no decoder.
    """

    def __init__(self, config: Config, shards: ShardSet, decode: bool) -> None:
        self.decoded = 0
        source = Source(
            tars=tuple(shards.tars("train")),
            indexes=tuple(shards.indexes("train")),
            codec=shards.codec,
            native_rate=False,  # not read this far
            segment_seconds=shards.segment_seconds,
            shuffle_buffer=config.data.shuffle_buffer,
        )

        @pipeline_def(
            batch_size=config.encoder.batch_size,
            num_threads=config.data.threads,
            device_id=None,
            prefetch_queue_depth=config.data.prefetch,
            exec_dynamic=True,
            concurrency=OperatorConcurrency.FULL,
        )
        def define() -> tuple[DataNode, ...]:
            encoded, row = read(source, config.train.seed)
            if not decode:
                return encoded, row
            wave, _ = fn.decoders.audio(encoded, dtype=types.FLOAT, downmix=True)
            return wave, row

        self.pipeline = define()
        build_on_new_pool(self.pipeline)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            data, row = self.pipeline.run()
            self.decoded += len(data)
            yield torch.from_dlpack(row.as_tensor()).reshape(-1)


def random_batch(config: Config, shards: ShardSet, device: torch.device) -> Batch:
    """A batch that has always been on the device; its segments are the first of the shards, going round."""
    log_mel, size = log_mel_settings(config), config.train.micro_batch_of(config.encoder.batch_size)
    shapes = encoder_type(config).input_shapes(log_mel, view_seconds(config, shards))
    data = [torch.randn(size, *shape, device=device) for shape in shapes]
    segment = torch.arange(size) % len(shards.segments)
    return Batch(tuple(data), segment)


def trained(config: Config, shards: ShardSet, world: World, batches: Iterable[Batch], steps: int) -> Stage:
    """The trainer's step on each of `batches`, under the trainer's clock. steps: in an epoch, for the learning rate."""
    learner = Learner(config, shards, world)
    learner.encoder.train()
    clock = StepClock(world.device)

    def run() -> Iterator[Tensor]:
        for number, own in enumerate(groups(clock.batches(batches), learner.micro_batches)):
            rows: list[Tensor] = []
            rates = learning_rates(config, number % steps, steps, config.encoder.batch_size)
            learner.step(_noting(own, rows), *rates)
            yield torch.cat(rows)

    return Stage(run(), world.device, clock=clock)


def _noting(batches: Iterable[Batch], rows: list[Tensor]) -> Iterator[Batch]:
    """The batches as they come; the segments of each are added to `rows`."""
    for batch in batches:
        rows.append(batch.segment)
        yield batch


KINDS = (*LOADER, *TRAINING, "pack", *BASELINES, *BASELINE_OF_TRAIN)
