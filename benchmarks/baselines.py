"""What a careful user writes without DALI: the same views, out of the same tars, by soundfile, torch and torchaudio.

Careful means: segments are read at their offsets; worker processes of one thread each, kept alive, two batches ahead;
one STFT a view; filter banks, windows and resampling kernels are made once; pitch rates are rounded to 500 Hz, so that
torchaudio's resampling kernel stays small (its cost grows with rate / gcd); masks and shifts copy once; the reverb's
convolution goes by FFT of a power of two. Probabilities and ranges are the config's, drawn for each view.

| stage | |
|---|---|
| baseline/light | DataLoader: shift, gain, noise, SpecAugment (the list of loader/light) |
| baseline/full | DataLoader: all eight; stretch by phase vocoder, reverb by a decaying noise impulse response |
| baseline/plain_pitch | baseline/full with torchaudio.functional.pitch_shift as it stands, a segment a batch |
| baseline/songs | baseline/light out of the songs themselves: soundfile seeks to the segment and reads it |
| baseline/gpu_light | webdataset workers decode, the GPU makes the views of baseline/light |
| baseline/gpu_full | webdataset workers decode, the GPU makes the views of baseline/full |
"""

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch_views import Views

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.schema import Config
from simsiam_dali.data.format import read_index
from simsiam_dali.data.graph import LogMel
from simsiam_dali.data.loader import Batch
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.training.data import view_seconds

PREFETCH = 2  # batches each worker keeps ready


def decoded(encoded: bytes) -> tuple[Tensor, int]:
    """Mono float32 `(N,)` and its rate, Hz."""
    wave, rate = soundfile.read(io.BytesIO(encoded), dtype="float32")
    return torch.from_numpy(wave), rate


class Segments(Dataset[tuple[Tensor, Tensor, int]]):
    """The training segments, each read at its offset in its tar, as two views and its row."""

    def __init__(self, shards: ShardSet, views: Views) -> None:
        self.views = views
        self.stored = [
            (Path(tar), *sample[shards.codec][:2], int(sample["row"][2].split(".")[0]))
            for tar, index in zip(shards.tars("train"), shards.indexes("train"), strict=True)
            for sample in read_index(index)
        ]

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, int]:
        tar, offset, size, row = self.stored[number]
        with tar.open("rb") as file:
            file.seek(offset)
            encoded = file.read(size)
        return *self.views(*decoded(encoded)), row


class SongSegments(Segments):
    """The same segments out of the songs that were packed."""

    def __init__(self, shards: ShardSet, views: Views) -> None:
        self.views, self.seconds = views, shards.segment_seconds
        table = shards.segments[shards.segments["split"] == "train"]
        paths = [Path(shards.manifest.music) / path for path in shards.songs["path"]]
        self.cuts = [
            (paths[song], start, row)
            for song, start, row in zip(table["song"], table["start"], table.index, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, int]:
        path, start, row = self.cuts[number]
        with soundfile.SoundFile(path) as file:
            rate, size = file.samplerate, round(self.seconds * file.samplerate)
            file.seek(round(start * rate))
            wave = file.read(size, dtype="float32", always_2d=True).mean(axis=1)
        return *self.views(torch.from_numpy(np.resize(wave, size)), rate), row  # a short song is repeated


class Endless(Sampler[list[int]]):
    """Batches of one random order after another, without the pause at an epoch's end."""

    def __init__(self, count: int, batch_size: int) -> None:
        self.count, self.batch_size = count, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            order = torch.randperm(self.count).tolist()
            for start in range(0, self.count - self.batch_size + 1, self.batch_size):
                yield order[start : start + self.batch_size]


def one_thread(worker: int) -> None:
    """Set a worker up: as many processes as cores, one thread each, draws of its own."""
    torch.set_num_threads(1)
    random.seed(torch.initial_seed() + worker)
    np.random.seed((torch.initial_seed() + worker) % 2**32)


def collated(samples: list[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Views stacked to `(B, n_mels, T)`, and rows."""
    first, second, rows = zip(*samples, strict=True)
    return (torch.stack(first), torch.stack(second), torch.tensor(rows))


@dataclass(frozen=True)
class Baseline:
    """Which baseline: `full` list or light; views made in DataLoader workers, or on the GPU from webdataset's.

    plain_pitch: see `Views`. songs: read the songs, not the shards.
    """

    full: bool
    gpu: bool = False
    plain_pitch: bool = False
    songs: bool = False

    def batches(
        self, config: Config, shards: ShardSet, log_mel: LogMel, device: torch.device, workers: int
    ) -> Iterator[Batch]:
        """Batches on `device` without end."""
        if shards.count("train") < config.encoder.batch_size:
            raise UserError(
                f"a batch of {config.encoder.batch_size} is larger than the data set ({shards.count('train')} segments)"
            )
        views = Views(
            config.encoder.simsiam.augmentation,
            log_mel,
            view_seconds(config, shards),
            config.data.view_crops,
            device if self.gpu else torch.device("cpu"),
            self.full,
            self.plain_pitch,
        )
        batch_size = 1 if self.plain_pitch else config.encoder.batch_size
        if self.gpu:
            return from_webdataset(shards, views, batch_size, workers)
        segments = SongSegments(shards, views) if self.songs else Segments(shards, views)
        return from_data_loader(segments, batch_size, workers, device)

    def bytes_to_device(self, shards: ShardSet, log_mel: LogMel, seconds: float, device: torch.device) -> int:
        """Copied to the GPU for each sample: the segment at the shards' rate, or two views; float32."""
        if device.type != "cuda":
            return 0
        if self.gpu:
            return round(4 * shards.segment_seconds * float(shards.segments["sample_rate"].mean()))
        return 2 * 4 * log_mel.n_mels * log_mel.frames(seconds)


BASELINES = {
    "baseline/light": Baseline(full=False),
    "baseline/full": Baseline(full=True),
    "baseline/plain_pitch": Baseline(full=True, plain_pitch=True),
    "baseline/songs": Baseline(full=False, songs=True),
    "baseline/gpu_light": Baseline(full=False, gpu=True),
    "baseline/gpu_full": Baseline(full=True, gpu=True),
}


def from_data_loader(segments: Segments, batch_size: int, workers: int, device: torch.device) -> Iterator[Batch]:
    """The workers make the views."""
    loader = DataLoader(
        segments,
        batch_sampler=Endless(len(segments), batch_size),
        num_workers=workers,
        collate_fn=collated,
        worker_init_fn=one_thread,
        persistent_workers=True,
        prefetch_factor=PREFETCH,
        multiprocessing_context="fork",  # as in a script of its own; a spawned process would spawn
        pin_memory=device.type == "cuda",
    )
    for view1, view2, rows in loader:
        yield Batch(tuple(view.to(device, non_blocking=True) for view in (view1, view2)), rows)


Waves = tuple[Tensor, list[tuple[int, int]], Tensor]  # (B, longest), each one's samples and rate in Hz, rows


def padded(samples: list[tuple[Tensor, int, int]]) -> Waves:
    """One tensor for one copy to the GPU."""
    waves = torch.nn.utils.rnn.pad_sequence([wave for wave, _, _ in samples], batch_first=True)
    return waves, [(len(wave), rate) for wave, rate, _ in samples], torch.tensor([row for _, _, row in samples])


def from_webdataset(shards: ShardSet, views: Views, batch_size: int, workers: int) -> Iterator[Batch]:
    """The workers decode, the GPU makes the views."""

    def wave_and_row(sample: dict[str, Any]) -> tuple[Tensor, int, int]:
        return *decoded(sample[shards.codec]), int.from_bytes(sample["row"], "little")

    segments = (
        webdataset.WebDataset([str(tar) for tar in shards.tars("train")], resampled=True, shardshuffle=False)
        .shuffle(shards.count("train"))
        .map(wave_and_row)
        .batched(batch_size, collation_fn=padded, partial=False)
    )
    loader = webdataset.WebLoader(
        segments,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=one_thread,
        persistent_workers=True,
        prefetch_factor=PREFETCH,
        multiprocessing_context="fork",
        pin_memory=views.device.type == "cuda",
    )
    for waves, sizes, rows in loader:
        waves = waves.to(views.device, non_blocking=True)
        yield Batch(views.of_batch([(wave[:n], rate) for wave, (n, rate) in zip(waves, sizes, strict=True)]), rows)
