"""From a decoded segment to log-mel views: crop, front-end rate, spectrogram, augmentations.

The mel front end equals `torchaudio.transforms.MelSpectrogram` (periodic Hann window, HTK mel scale, no filter
normalisation) followed by `AmplitudeToDB`.
"""

import functools
import operator

import numpy as np

from simsiam_dali.data import augment, mixing
from simsiam_dali.data.dali import DataNode, fn, math, types
from simsiam_dali.data.graph import GraphConfig, LogMel

FLOOR_DB = -100.0
"""Log-mel floor: `AmplitudeToDB(amin=1e-10)`."""

CONVERT_QUALITY = 50.0
"""DALI's resampling quality, 0..100: 16 lobes of the sinc on each side."""

BAND_EDGE = 0.94
"""Where the low-pass before a conversion is 6 dB down, as a fraction of the front end's Nyquist frequency."""

MISSING_S = 0.1
"""How much of its end a segment may lack, s: lossy codecs and resamplers drop some samples."""

NOISE_BANK_EXTRA_S = 15.0
"""How much longer than a view the bank of noise is, s: a view's noise may start anywhere in it."""


def power_spectrogram(wave: DataNode, spec: LogMel) -> DataNode:
    """Power `(F, 1 + n_fft // 2)` of `wave (N,)`, F = 1 + N // hop. Time first: 2.5 times faster that way."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(spec.n_fft) / spec.n_fft)
    return fn.spectrogram(
        wave,
        nfft=spec.n_fft,
        window_length=spec.n_fft,
        window_step=spec.hop_length,
        window_fn=window.tolist(),
        power=2,
        layout="tf",
    )


def mel_power(power: DataNode, spec: LogMel) -> DataNode:
    """Mel power `(F, n_mels)` of a power spectrogram `(F, 1 + n_fft // 2)`."""
    # Conditionals merge only equal layouts, and warps set another one.
    return fn.reshape(augment.mel_filters(power, spec.sample_rate, spec.n_mels, 0.0), layout="")


def normalise(mel: DataNode, spec: LogMel) -> DataNode:
    """Mel power to dB, then to zero mean and unit std over the data set, in one pass."""
    return fn.to_decibels(
        mel,
        multiplier=10.0 / spec.std,
        reference=10.0 ** (spec.mean / 10.0),
        cutoff_db=(FLOOR_DB - spec.mean) / spec.std,
    )


def clean_view(wave: DataNode, spec: LogMel) -> DataNode:
    """The log-mel `(T, n_mels)` of `wave (N,)`, at the front end's rate, without any augmentation."""
    return normalise(mel_power(power_spectrogram(wave, spec), spec), spec)


def crop(wave: DataNode, rate: DataNode, graph: GraphConfig, at: DataNode | float) -> DataNode:
    """The `graph.seconds` of `wave (N,)` that a view shows; `at`, 0 to 1, from the first possible start to the last."""
    if graph.seconds >= graph.source.segment_seconds:
        return wave
    length = augment.integer(rate * graph.seconds)
    free = math.max(wave.shape(dtype=types.INT32)[0] - length, 0)
    start = augment.integer(at * free)
    return fn.slice(wave, start=start, end=start + length, axes=[0], out_of_bounds_policy="trim_to_shape")


def to_front_end_rate(wave: DataNode, rate: DataNode, graph: GraphConfig, gpu: bool) -> DataNode:
    """`wave (N,)` at the front end's rate, exactly `graph.seconds` long; up to `MISSING_S` of its end are zeros."""
    spec = graph.log_mel
    if graph.source.native_rate:
        if rate > float(spec.sample_rate):  # resampling would fold back what is above the Nyquist frequency
            wave = augment.low_pass(wave, BAND_EDGE * spec.sample_rate / rate, gpu)
        wave = augment.resample(wave, rate, float(spec.sample_rate), CONVERT_QUALITY)
    elif graph.source.codec in ("flac", "wav") and graph.seconds >= graph.source.segment_seconds:
        return wave  # a whole segment that was packed at its exact length, by a codec that keeps it
    # A segment that lacks more stays too short: an error of the graph in a clean view, and mostly in a shifted one.
    longest = wave.shape(dtype=types.INT32)[0] + round(MISSING_S * spec.sample_rate)
    end = math.min(longest, round(graph.seconds * spec.sample_rate))
    start = types.Constant(np.int32(0), device="cpu")
    return fn.slice(wave, start=start, end=end, axes=[0], out_of_bounds_policy="pad")


def noise_bank(graph: GraphConfig, seed: int) -> np.ndarray | None:
    """Unit-variance Gaussian noise `(M,)`, `NOISE_BANK_EXTRA_S` longer than a view; None when no view can be noisy."""
    if graph.augmentation.noise_prob == 0:
        return None
    samples = round((graph.seconds + NOISE_BANK_EXTRA_S) * graph.log_mel.sample_rate)
    return np.random.default_rng(augment.derive_seed(seed, "noise bank")).standard_normal(samples, np.float32)


def spectrum(wave: DataNode, graph: GraphConfig) -> DataNode:
    """The power `(F, 1 + n_fft // 2)` of a view; its mel power `(F, n_mels)` if no view is pitch-shifted."""
    power = power_spectrogram(wave, graph.log_mel)
    return power if graph.augmentation.pitch_shift_prob > 0 else mel_power(power, graph.log_mel)


def noisy_spectrum(wave: DataNode, draws: augment.Draws, bank: DataNode | None, graph: GraphConfig) -> DataNode:
    """The `spectrum` of one view, with noise where drawn."""
    if bank is not None and draws.noisy:
        # The pitch shift comes later; the level that it removes from the noise is added beforehand.
        snr_db = draws.snr_db - augment.pitch_level_db(draws.semitones)
        wave = augment.add_noise(wave, snr_db, bank, draws.noise_at)
    return spectrum(wave, graph)


def view(spectrum: DataNode, draws: augment.Draws, graph: GraphConfig, gpu: bool) -> DataNode:
    """A view `(T, n_mels)` from its `spectrum`: pitch, time shift, tempo, reverb, gain, mixup, log, crop, masks."""
    spec, cfg, mel = graph.log_mel, graph.augmentation, spectrum
    frames, hop_seconds = spec.frames(graph.seconds), spec.hop_length / spec.sample_rate
    if cfg.pitch_shift_prob > 0:
        steps = augment.pitch_steps(*cfg.pitch_shift_range)
        mel = augment.pitched_mel(spectrum, draws.semitones, steps, spec.sample_rate, spec.n_mels)
    # A faster tempo needs more audio than the view is long; that and the shift wrap around the end.
    length = augment.integer(math.ceil((frames - 1) * draws.rate) + 1)
    # The last frame lies where the wave ends, which is where it begins: nearer than half a hop, they are one.
    overlap = int(2 * (round(graph.seconds * spec.sample_rate) % spec.hop_length) < spec.hop_length)
    start = augment.integer(draws.shift * (frames - overlap))
    longest = max(1.0, cfg.time_stretch_range[1]) if cfg.time_stretch_prob > 0 else 1.0  # in lengths of the view
    passes = 1 + int(np.ceil(longest))
    mel = augment.circular_slice(mel, start, length, passes, overlap_frames=overlap)
    if cfg.time_stretch_prob > 0 and draws.stretched:
        mel = augment.time_scale(mel, draws.rate, frames, spec.n_mels)
    if cfg.reverb_prob > 0 and draws.reverberant:
        mel = augment.reverb(mel, draws.rt60, draws.drr_db, cfg.reverb_rt60_range[1], hop_seconds, gpu)
    mel = augment.gain(mel, draws.gain_db)
    if cfg.mixup_prob > 0:
        mel = mixing.mixup(mel, draws.share, draws.other)
    log_mel = normalise(mel, spec)
    if cfg.crop_prob > 0 and draws.cropped:
        log_mel = mixing.resized_crop(log_mel, draws.crop_frames, draws.crop_mels, (frames, spec.n_mels))
    return augment.spec_augment(log_mel, draws)


def augmented_views(
    waves: list[DataNode], draws: list[augment.Draws], bank: DataNode | None, graph: GraphConfig, gpu: bool
) -> list[DataNode]:
    """The augmented views `(T, n_mels)` of `waves (N,)`, their crops at the front end's rate.

    If all show the same crop and none is noisy, they share its STFT, the most expensive part of a view.
    """
    if graph.crops == "same" and functools.reduce(operator.or_, [own.noisy for own in draws]) == 0:
        shared = spectrum(waves[0], graph)
        spectra = [shared for _ in waves]
    else:
        spectra = [noisy_spectrum(wave, own, bank, graph) for wave, own in zip(waves, draws)]  # noqa: B905 - DALI's zip
    return [view(each, own, graph, gpu) for each, own in zip(spectra, draws)]  # noqa: B905
