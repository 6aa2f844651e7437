"""Stretch, pitch and reverb against the waveform route: what a phase vocoder and a convolution would have given.

The graph does all three on the mel power, so phases are not kept and interference is not modelled: the log-mels agree
closely, not exactly. Each threshold stands far above the correlation of the untouched log-mel with the waveform route.
"""

import numpy as np
import torch
from helpers.signals import RATE, Array, augmented, correlation, reference_log_mel, song
from scipy.signal import fftconvolve
from torchaudio.functional import phase_vocoder, pitch_shift

SECONDS = 6.0
SONGS = [song(SECONDS, seed) for seed in range(8)]


def stretched(wave: Array, rate: float) -> Array:
    """The first `SECONDS` of `wave` repeated without end, at `rate` times its tempo, by a phase vocoder."""
    wave = np.resize(wave, round(len(wave) * rate) + 4096)
    window, hop = torch.hann_window(2048), 512
    spectrum = torch.stft(torch.from_numpy(wave), 2048, hop, window=window, return_complex=True)
    advance = torch.linspace(0, np.pi * hop, 1025)[:, None]
    slow = torch.istft(phase_vocoder(spectrum, rate, advance), 2048, hop, window=window)
    return slow.numpy()[: round(SECONDS * RATE)]


def pitched(wave: Array, semitones: float) -> Array:
    return pitch_shift(torch.from_numpy(wave), RATE, semitones + 1e-9, n_fft=2048).numpy()


def reverberated(wave: Array, rt60: float, drr_db: float, seed: int) -> Array:
    """`wave` in a room: noise under an exponential decay after the direct sound (Polack's model itself)."""
    times = np.arange(1, round(1.5 * rt60 * RATE)) / RATE
    tail = np.random.default_rng(seed).standard_normal(len(times)) * 10 ** (-3 * times / rt60)
    tail *= np.sqrt(10 ** (-drr_db / 10) / np.sum(tail**2))
    return fftconvolve(wave, np.concatenate([[1.0], tail]))[: len(wave)].astype(np.float32)


def agreement(waves: list[Array], draws: list[dict[str, float]]) -> tuple[float, float]:
    """Mean correlation with the log-mels of `waves`: of the graph's views of `SONGS`, and of the untouched songs."""
    reference = [reference_log_mel(wave) for wave in waves]
    views = augmented(SONGS, draws)
    untouched = [reference_log_mel(wave) for wave in SONGS]
    return (
        float(np.mean([correlation(a, b) for a, b in zip(views, reference, strict=True)])),
        float(np.mean([correlation(a, b) for a, b in zip(untouched, reference, strict=True)])),
    )


def test_stretch_equals_a_phase_vocoder() -> None:
    rates = (0.8, 0.87, 0.93, 0.98, 1.03, 1.08, 1.14, 1.2)
    waves = [stretched(wave, rate) for wave, rate in zip(SONGS, rates, strict=True)]
    view, untouched = agreement(waves, [{"rate": rate} for rate in rates])
    assert view >= 0.95
    assert untouched < 0.85


def test_pitch_equals_torchaudio() -> None:
    # For these the ratio of rates is a fraction of small numbers; torchaudio takes seconds for any other.
    semitones = [12 * np.log2(rate / RATE) for rate in (14400, 14800, 15000, 15500, 16500, 17000, 17500, 17800)]
    waves = [pitched(wave, step) for wave, step in zip(SONGS, semitones, strict=True)]
    view, untouched = agreement(waves, [{"semitones": step} for step in semitones])
    assert view >= 0.92
    assert untouched < 0.85


def notes(semitones: float, seed: int) -> Array:
    """Plucked notes of 29 harmonics over faint noise, all notes `semitones` higher: a true pitch shift. RMS 0.08."""
    rng, time = np.random.default_rng(seed), np.arange(3 * RATE) / RATE
    wave = np.zeros_like(time)
    for _ in range(12):
        hz = 110 * 2 ** ((rng.integers(0, 36) + semitones) / 12)
        since = time - rng.uniform(0, 2.5)
        envelope = np.where(since > 0, np.exp(-since / rng.uniform(0.1, 0.6)) * np.clip(since / 0.005, 0, 1), 0)
        for harmonic, phase in enumerate(rng.uniform(0, 2 * np.pi, 29), start=1):
            if harmonic * hz < RATE / 2:
                wave += envelope / harmonic * np.sin(2 * np.pi * harmonic * hz * time + phase)
    wave *= 0.08 / np.sqrt(np.mean(wave**2))
    return (wave + 0.08 * 10 ** (-50 / 20) * rng.standard_normal(len(wave))).astype(np.float32)


def test_pitch_equals_notes_played_higher() -> None:
    semitones = (-2.0, -1.06, 0.43, 1.56)
    truth = [reference_log_mel(notes(s, seed)) for seed, s in enumerate(semitones)]
    low = [notes(0.0, seed) for seed in range(len(semitones))]
    views = augmented(low, [{"semitones": s} for s in semitones])
    # A phase vocoder and a resampler (`pitched`) reach 0.94 here.
    assert np.mean([correlation(view, true) for view, true in zip(views, truth, strict=True)]) >= 0.97
    assert np.mean([correlation(reference_log_mel(x), true) for x, true in zip(low, truth, strict=True)]) < 0.75


def test_reverb_equals_a_convolution_with_decaying_noise() -> None:
    rooms = [(rt60, drr_db) for rt60 in (0.3, 0.6, 0.9, 1.2) for drr_db in (0.0, 6.0)]
    waves = [reverberated(wave, *room, seed) for seed, (wave, room) in enumerate(zip(SONGS, rooms, strict=True))]
    draws = [{"reverberant": True, "rt60": rt60, "drr_db": drr} for rt60, drr in rooms]
    view, untouched = agreement(waves, draws)
    assert view >= 0.97
    assert untouched < 0.95
