"""The two views as torch and torchaudio make them, on the CPU or on a GPU: what baselines.py feeds and times."""

import functools
import math
import random

import torch
import torchaudio
from torch import Tensor

from simsiam_dali.config.schema import AugmentationConfig
from simsiam_dali.data.graph import LogMel

PITCH_STEP = 500  # Hz; at 16 kHz about half a semitone


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
