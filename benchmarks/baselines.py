"""What a careful user writes without DALI: the same views, out of the same tars, by soundfile, torch and torchaudio.

Careful means: segments are read at their offsets; worker processes of one thread each, kept alive, two batches ahead;
one STFT a view; filter banks, windows and resampling kernels are made once; pitch rates are rounded to 500 Hz, so that
torchaudio's resampling kernel stays small (its cost grows with rate / gcd); masks and shifts copy once; the reverb's
convolution goes by FFT of a power of two. Probabilities and ranges are the config's, drawn anew for each view.

| stage | |
|---|---|
| baseline/light | DataLoader: shift, gain, noise, SpecAugment (the list of loader/card) |
| baseline/full | DataLoader: all eight; stretch by phase vocoder, reverb by a decaying noise impulse response |
| baseline/plain_pitch | baseline/full with torchaudio.functional.pitch_shift as it stands, a segment a batch |
| baseline/songs | baseline/light out of the songs themselves: soundfile seeks to the segment and reads it |
| baseline/gpu_light | webdataset workers decode, the GPU makes the views of baseline/light |
| baseline/gpu_full | webdataset workers decode, the GPU makes the views of baseline/full |
"""

import functools
import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from simsiam_dali import factory
from simsiam_dali.config import AugmentationConfig, Config
from simsiam_dali.data.loader import Batch
from simsiam_dali.data.pipeline import LogMel
from simsiam_dali.data.shards import ShardSet, read_index
from simsiam_dali.errors import UserError

PITCH_STEP = 500  # Hz; at 16 kHz about half a semitone
PREFETCH = 2  # batches each worker keeps ready


class Views:
    """Two augmented log-mels of a wave, on the wave's device.

    full: all eight augmentations, else shift, gain, noise and masks. plain_pitch: torchaudio's pitch_shift as it is.
    """

    def __init__(
        self,
        cfg: AugmentationConfig,
        spec: LogMel,
        seconds: float,
        crops: str,
        device: torch.device,
        full: bool,
        plain_pitch: bool = False,
    ) -> None:
        self.cfg, self.spec, self.seconds, self.crops = cfg, spec, seconds, crops
        self.full, self.plain_pitch, self.device = full, plain_pitch, device
        self.frames = spec.frames(seconds)
        self.stft = torchaudio.transforms.Spectrogram(spec.n_fft, hop_length=spec.hop_length, power=None).to(device)
        self.mel = torchaudio.transforms.MelScale(spec.n_mels, spec.sample_rate, n_stft=spec.n_fft // 2 + 1).to(device)
        self.decibels = torchaudio.transforms.AmplitudeToDB("power")
        self.phase_advance = torch.linspace(0, math.pi * spec.hop_length, spec.n_fft // 2 + 1, device=device)[:, None]

    @functools.cache  # noqa: B019 - one object lives as long as its process
    def resampler(self, rate: int, new_rate: int) -> torch.nn.Module:
        """A resampler whose kernel is made once."""
        return torchaudio.transforms.Resample(rate, new_rate).to(self.device)

    def __call__(self, wave: Tensor, rate: int) -> tuple[Tensor, Tensor]:
        """Two views `(n_mels, T)` of a segment `wave (N,)` at `rate` Hz."""
        view = self.full_view if self.full else self.light_view
        first, second = self.cropped(wave, rate)
        return view(first), view(second)

    def of_batch(self, waves: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Two views `(B, n_mels, T)` of each `(wave (N,), Hz)`; where all lengths stay equal, with one STFT for all."""
        first, second = zip(*(self.cropped(wave, rate) for wave, rate in waves), strict=True)
        if self.full:
            views = torch.stack([self.full_view(wave) for wave in (*first, *second)])
        else:
            views = self.log_mel(torch.stack([self.light_wave(wave) for wave in (*first, *second)]))
            for view in views:
                self.mask(view)
        return views[: len(waves)], views[len(waves) :]

    def cropped(self, wave: Tensor, rate: int) -> tuple[Tensor, Tensor]:
        """The places of the two views, at the front end's rate."""
        if rate != self.spec.sample_rate:
            wave = self.resampler(rate, self.spec.sample_rate)(wave)
        first = self.crop(wave)
        return first, self.crop(wave) if self.crops == "independent" else first

    def crop(self, wave: Tensor) -> Tensor:
        """A random stretch of a view's length."""
        samples = round(self.seconds * self.spec.sample_rate)
        start = random.randint(0, max(0, len(wave) - samples))
        wave = wave[start : start + samples]
        return torch.nn.functional.pad(wave, (0, samples - len(wave)))

    def light_view(self, wave: Tensor) -> Tensor:
        """One view by the light list."""
        return self.mask(self.log_mel(self.light_wave(wave)))

    def light_wave(self, wave: Tensor) -> Tensor:
        """The part of the light list that is done on the wave."""
        wave = self.shifted_and_loud(wave)
        return self.noisy(wave) if drawn(self.cfg.noise_prob) else wave

    def log_mel(self, wave: Tensor) -> Tensor:
        """Log-mel of `(..., N)`, normalised."""
        return self.log(self.mel(self.stft(wave).abs().square()))

    def full_view(self, wave: Tensor) -> Tensor:
        """One view by all eight."""
        cfg, rate = self.cfg, self.spec.sample_rate
        wave = self.shifted_and_loud(wave)
        tempo = random.uniform(*cfg.time_stretch_range) if drawn(cfg.time_stretch_prob) else 1.0
        if drawn(cfg.pitch_shift_prob):
            semitones = random.uniform(*cfg.pitch_shift_range)
            if self.plain_pitch:
                wave = torchaudio.functional.pitch_shift(wave, rate, semitones)
            else:
                # Resampled, it sounds higher and faster; the vocoder takes the speed out, with the stretch in one pass.
                new_rate = round(rate / 2 ** (semitones / 12) / PITCH_STEP) * PITCH_STEP
                wave = self.resampler(rate, new_rate)(wave)
                tempo *= new_rate / rate
        if drawn(cfg.reverb_prob):
            wave = self.reverberant(wave)
        if drawn(cfg.noise_prob):
            wave = self.noisy(wave)
        spectrum = self.stft(wave)
        if tempo != 1.0:
            spectrum = torchaudio.functional.phase_vocoder(spectrum, tempo, self.phase_advance)
        mel = self.mel(spectrum.abs().square())[:, : self.frames]
        # A faster tempo leaves the end empty: it goes round, as the graph's views do.
        while mel.shape[1] < self.frames:
            mel = torch.cat([mel, mel[:, : self.frames - mel.shape[1]]], dim=1)
        return self.mask(self.log(mel))

    def shifted_and_loud(self, wave: Tensor) -> Tensor:
        """Circular shift, and gain."""
        cfg = self.cfg
        if drawn(cfg.time_shift_prob):
            wave = wave.roll(int(random.uniform(*cfg.time_shift_range) * len(wave)))
        if drawn(cfg.gain_prob):
            wave = wave * 10 ** (random.uniform(*cfg.gain_range) / 20)
        return wave

    def noisy(self, wave: Tensor) -> Tensor:
        """White noise at a drawn SNR."""
        snr_db = random.uniform(*self.cfg.noise_snr_range)
        level = wave.square().mean().sqrt() * 10 ** (-snr_db / 20)
        return torch.randn_like(wave).mul_(level).add_(wave)

    def reverberant(self, wave: Tensor) -> Tensor:
        """Convolved with a noise impulse response that decays by 60 dB in a drawn RT60."""
        rt60, drr_db = random.uniform(*self.cfg.reverb_rt60_range), random.uniform(*self.cfg.reverb_drr_range)
        taps = int(rt60 * self.spec.sample_rate)
        tail = torch.randn(taps, device=wave.device)
        tail *= torch.exp(torch.linspace(0, -math.log(1e3), taps, device=wave.device))  # amplitude: half the 60 dB's ln
        tail *= 10 ** (-drr_db / 20) / tail.square().sum().sqrt()
        tail[0] = 1.0
        size = 1 << (len(wave) + taps - 1).bit_length()
        return torch.fft.irfft(torch.fft.rfft(wave, size) * torch.fft.rfft(tail, size), size)[: len(wave)]

    def log(self, mel: Tensor) -> Tensor:
        """dB, normalised."""
        return self.decibels(mel).sub_(self.spec.mean).mul_(1 / self.spec.std)

    def mask(self, log_mel: Tensor) -> Tensor:
        """SpecAugment on `(n_mels, T)`, in place."""
        cfg = self.cfg
        if cfg.spec_augment:
            for dim, probability, param in (
                (0, cfg.frequency_mask_prob, cfg.frequency_mask_param),
                (1, cfg.time_mask_prob, cfg.time_mask_param),
            ):
                if drawn(probability):
                    width = random.randint(0, min(param, log_mel.shape[dim]))
                    log_mel.narrow(dim, random.randint(0, log_mel.shape[dim] - width), width).zero_()
        return log_mel


def drawn(probability: float) -> bool:
    """A coin's side."""
    return random.random() < probability


def decoded(encoded: bytes) -> tuple[Tensor, int]:
    """Mono float32 `(N,)` and its rate, Hz."""
    wave, rate = soundfile.read(io.BytesIO(encoded), dtype="float32")
    return torch.from_numpy(wave), rate


class Segments(Dataset[tuple[Tensor, Tensor, int]]):
    """The training segments, each read at its place in its tar, as two views and its row."""

    def __init__(self, shards: ShardSet, views: Views) -> None:
        self.views = views
        self.places = [
            (tar, *sample[shards.codec][:2], int(sample["row"][2].split(".")[0]))
            for tar, index in zip(shards.tars("train"), shards.indexes("train"), strict=True)
            for sample in read_index(index)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, int]:
        tar, offset, size, row = self.places[number]
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
            factory.view_seconds(config, shards),
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
        yield Batch(view1.to(device, non_blocking=True), view2.to(device, non_blocking=True), rows)


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
        yield Batch(*views.of_batch([(wave[:n], rate) for wave, (n, rate) in zip(waves, sizes, strict=True)]), rows)
