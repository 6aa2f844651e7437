"""The augmentations as functions from DALI nodes to DALI nodes, and their random draws.

Each is applied where it is cheap. On the waveform `(N,)`: noise. On the power spectrogram `(F, bins)`, time first:
pitch shift, by the mel filters. On the mel power `(F, n_mels)`: time shift, time stretch, reverb, gain, mixup. On the
normalised log-mel: resized crop, masks. Mixup and crop are in `mixing`. Drawing is separate from applying: `draw` makes
the random numbers, the rest is a deterministic function of them, so a test can set a known draw, and a GPU graph can be
compared with a CPU graph on the same draws.

Argument inputs (everything in `Draws`) are always CPU scalars, which DALI accepts for operators on either device.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from simsiam_dali.config.schema import AugmentationConfig
from simsiam_dali.data.dali import DataNode, fn, math, types

DECAY_60_DB = np.log(1e6)
"""Energy falls by 60 dB when its exponent falls by ln(10^6)."""

LOW_PASS_TAPS = 129

PITCH_STEP = 0.125
"""Semitones from one mel filter bank to the next: a pitch shift is rounded to the nearest."""


Part = tuple[DataNode | float, DataNode | float]
"""Where a part starts, and how much of the whole it is, both in parts of the whole."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of one view of one sample; neutral if an augmentation is off (rate 1, 0 semitones, 0 dB)."""

    shift: DataNode  # fraction of the view, FLOAT in [0, 1)
    rate: DataNode  # tempo, FLOAT; above 1 is faster
    semitones: DataNode  # FLOAT
    stretched: DataNode  # BOOL: the rate was drawn, so the mel's time axis has to be interpolated
    noisy: DataNode  # BOOL
    snr_db: DataNode  # FLOAT, read where noisy
    noise_at: DataNode  # FLOAT in [0, 1): position in the noise bank
    gain_db: DataNode  # FLOAT
    reverberant: DataNode  # BOOL
    rt60: DataNode  # FLOAT, s
    drr_db: DataNode  # FLOAT
    mel_start: DataNode  # FLOAT, mel bin where the frequency mask starts
    mel_width: DataNode  # FLOAT, whole number of mel bins
    time_start: DataNode  # FLOAT, frame where the time mask starts
    time_width: DataNode  # FLOAT, whole number of frames
    share: DataNode | float = 0.0  # FLOAT in [0, 1], of the power of another segment of the batch
    other: DataNode | int = 0  # INT32, that segment's place in the batch
    cropped: DataNode | bool = False  # BOOL
    crop_frames: Part = (0.0, 1.0)  # FLOAT, where the crop starts and how much it keeps, parts of the view
    crop_mels: Part = (0.0, 1.0)  # FLOAT, the same along frequency


def derive_seed(seed: int, name: str) -> int:
    """The seed of the operator called `name`: adding or removing another operator does not change its draws."""
    return zlib.crc32(f"{seed}/{name}".encode())


def uniform(low: float, high: float, seed: int) -> DataNode:
    """A FLOAT in [low, high); the constant `low` when they are equal (DALI refuses an empty range)."""
    if low == high:
        return types.Constant(np.float32(low), device="cpu")
    return fn.random.uniform(range=(low, high), dtype=types.FLOAT, seed=seed)


def draw(cfg: AugmentationConfig, frames: int, n_mels: int, seed: int) -> Draws:
    """Draw one view's augmentations for each sample, independently.

    frames, n_mels: size of the view, for the masks' positions. A mask's width is uniform on 0..param, its start uniform
    over the positions where it fits (arXiv:1904.08779, section 2).
    """

    def coin(name: str, probability: float) -> DataNode:
        return fn.random.coin_flip(probability=probability, dtype=types.INT32, seed=derive_seed(seed, name))

    def pick(name: str, value_range: tuple[float, float]) -> DataNode:
        return uniform(*value_range, derive_seed(seed, f"{name} value"))

    def mask(name: str, probability: float, param: int, size: int) -> tuple[DataNode, DataNode]:
        width = math.floor(pick(f"{name} width", (0.0, min(param, size) + 1.0))) * coin(name, probability)
        return math.floor(pick(f"{name} start", (0.0, 1.0)) * (size - width + 1)), width

    def crop(name: str) -> Part:
        kept = pick(f"crop {name} kept", cfg.crop_range)
        return pick(f"crop {name} start", (0.0, 1.0)) * (1.0 - kept), kept

    stretched, pitched = coin("stretch", cfg.time_stretch_prob), coin("pitch", cfg.pitch_shift_prob)
    noisy = coin("noise", cfg.noise_prob)
    masks = float(cfg.spec_augment)
    mel_start, mel_width = mask("mel mask", cfg.frequency_mask_prob * masks, cfg.frequency_mask_param, n_mels)
    time_start, time_width = mask("time mask", cfg.time_mask_prob * masks, cfg.time_mask_param, frames)
    # Without operators where they are off, so that a checkpoint of the graph fits graphs without them.
    mix: dict[str, Any] = {}
    if cfg.mixup_prob > 0:
        mix["share"] = pick("mix", cfg.mixup_range) * coin("mix", cfg.mixup_prob)
        mix["other"] = fn.batch_permutation(no_fixed_points=True, seed=derive_seed(seed, "mix with"))
    if cfg.crop_prob > 0:
        mix |= {"cropped": coin("crop", cfg.crop_prob) > 0, "crop_frames": crop("frames"), "crop_mels": crop("mels")}
    return Draws(
        **mix,
        shift=pick("shift", cfg.time_shift_range) * coin("shift", cfg.time_shift_prob),
        rate=1.0 + stretched * (pick("stretch", cfg.time_stretch_range) - 1.0),
        semitones=pitched * pick("pitch", cfg.pitch_shift_range),
        stretched=stretched > 0,
        noisy=noisy > 0,
        snr_db=pick("noise", cfg.noise_snr_range),
        noise_at=pick("noise place", (0.0, 1.0)),
        gain_db=coin("gain", cfg.gain_prob) * pick("gain", cfg.gain_range),
        reverberant=coin("reverb", cfg.reverb_prob) > 0,
        rt60=pick("rt60", cfg.reverb_rt60_range),
        drr_db=pick("drr", cfg.reverb_drr_range),
        mel_start=mel_start,
        mel_width=mel_width,
        time_start=time_start,
        time_width=time_width,
    )


def integer(x: DataNode) -> DataNode:
    """`x` to the nearest INT32 (DALI's cast rounds), the type of slices' arguments."""
    return fn.cast(x, dtype=types.INT32)


def circular_slice(
    x: DataNode, start: DataNode, length: DataNode, passes: int = 2, overlap_frames: int = 0
) -> DataNode:
    """`length` frames of `x (N, n_mels)` from `start`, wrapping around its end.

    start: INT32 in [0, N]. length: INT32. passes: how often the slice may enter `x`, at least 1 + length / N.
    overlap_frames: frames at the end of `x` that repeat those at its beginning, which are skipped when it wraps.
    """
    size = x.shape(dtype=types.INT32)[0]
    first = types.Constant(np.int32(overlap_frames), device="cpu")
    end = math.min(start + length, size)
    pieces = [fn.slice(x, start=start, end=end, axes=[0])]
    left = length - (end - start)
    for _ in range(passes - 1):
        count = math.min(left, size - overlap_frames)
        pieces.append(fn.slice(x, start=first, end=overlap_frames + count, axes=[0]))
        left = left - count
    return fn.cat(*pieces, axis=0)


def resample(x: DataNode, in_rate: DataNode | float, out_rate: DataNode | float, quality: float) -> DataNode:
    """Sinc interpolation of `(N,)`.

    DALI's filter ends at the input's Nyquist frequency, whatever the output's: frequencies above the latter alias.
    """
    return fn.audio_resample(x, in_rate=in_rate, out_rate=out_rate, quality=quality)


def low_pass(x: DataNode, cutoff: DataNode, gpu: bool) -> DataNode:
    """Low-pass `x (N,)` at `cutoff`, a FLOAT fraction of its Nyquist frequency: a Hann-windowed sinc.

    6 dB down at the cutoff; 0.3 dB and 30 dB down 0.02 (of the Nyquist frequency) below and above it.
    """
    # On a CPU one row: `fn.filter` is ten times slower on one column. On a GPU one column: a thread there computes 16
    # values, one below the other, and a row has one of them (lanes of StaticConfig<2>, DALI's filter_gpu.cuh).
    shape = [-1, 1] if gpu else [1, -1]
    taps = np.arange(LOW_PASS_TAPS, dtype=np.float32) - LOW_PASS_TAPS // 2
    taps[LOW_PASS_TAPS // 2] = 1e-3  # the limit of sin(x) / x at 0
    window = np.hanning(LOW_PASS_TAPS + 2)[1:-1].astype(np.float32)
    sine = math.sin(types.Constant(np.pi * taps.reshape(shape), device="cpu") * cutoff)
    kernel = sine * types.Constant((window / taps).reshape(shape), device="cpu")
    kernel = kernel / fn.reductions.sum(kernel)
    return fn.reshape(fn.filter(fn.reshape(x, shape=shape), kernel.gpu() if gpu else kernel), shape=[-1])


def add_noise(x: DataNode, snr_db: DataNode, bank: DataNode, at: DataNode) -> DataNode:
    """Add white Gaussian noise at `snr_db` against the RMS of `x (N,)` itself.

    bank: unit-variance noise `(M,)`, M >= N, of which N samples from the random position `at` (in [0, 1)) are used:
    reading costs a tenth of drawing.
    """
    size = x.shape(dtype=types.INT32)[0]
    start = integer(at * (bank.shape(dtype=types.INT32)[0] - size))
    noise = fn.slice(bank, start=start, end=start + size, axes=[0])
    return x + fn.reductions.rms(x) * math.pow(10.0, snr_db / -20.0) * noise


def mel_filters(power: DataNode, sample_rate: int, n_mels: int, semitones: float) -> DataNode:
    """Mel power `(F, M)` of the power spectrogram `power (F, bins)` as if every bin stood `semitones` higher.

    HTK triangles, not normalised: a tone keeps its power. M is `n_mels`, or less if the spectrum is lowered: the
    highest filters, which reach beyond its end, are dropped.
    """
    scale, nyquist = 2.0 ** (semitones / 12), sample_rate / 2
    edges = 700 * (np.power(1 + nyquist / 700, np.arange(n_mels + 2) / (n_mels + 1)) - 1)  # Hz, equidistant in mel
    whole = n_mels if semitones >= 0 else int(np.sum(edges[2:] <= scale * nyquist))
    return fn.mel_filter_bank(
        power,
        nfilter=whole,
        sample_rate=scale * sample_rate,
        freq_high=float(edges[whole + 1]),
        mel_formula="htk",
        normalize=False,
    )


def fill_highest(mel: DataNode, n_mels: int) -> DataNode:
    """`mel (F, M)` as `(F, n_mels)`: bins above its M filters repeat the highest."""
    size = mel.shape(dtype=types.INT32)[1]
    if size < n_mels:
        highest = fn.slice(mel, start=size - 1, end=size, axes=[1])
        ones = types.Constant(np.ones((1, n_mels), np.float32), device="cpu")
        mel = fn.cat(mel, highest * fn.slice(ones, start=size, end=n_mels, axes=[1]), axis=1)
    return mel


def pitch_steps(low: float, high: float) -> list[float]:
    """The pitch shifts that have a bank of mel filters, in semitones: 0, and from `low` to `high` by `PITCH_STEP`."""
    steps = np.linspace(low, high, 1 + int(np.ceil((high - low) / PITCH_STEP)))
    return sorted({0.0, *map(float, steps)})


def pitch_level_db(semitones: DataNode) -> DataNode:
    """Change of the noise level by a pitch shift, dB: the same power in a wider or a narrower band."""
    return semitones * float(10 * np.log10(2) / 12)


def pitched_mel(power: DataNode, semitones: DataNode, steps: list[float], sample_rate: int, n_mels: int) -> DataNode:
    """Mel power `(F, n_mels)` of the power spectrogram `power (F, bins)`, `semitones` higher; the tempo stays.

    A pitch shift scales the frequency axis, and mel filters can be built for a scaled axis as well as for the plain
    one, at the same cost. There is a bank for each of the rising `steps`; 0 semitones is exact.
    """
    mel = fn.reshape(nearest_bank(power, semitones, steps, sample_rate, n_mels), layout="")
    return fill_highest(mel, n_mels) if steps[0] < 0 else mel


def nearest_bank(power: DataNode, semitones: DataNode, steps: list[float], sample_rate: int, n_mels: int) -> DataNode:
    """`mel_filters` for the nearest of the rising `steps` to `semitones`, by bisection."""
    if len(steps) == 1:
        return mel_filters(power, sample_rate, n_mels, steps[0])
    half = len(steps) // 2
    if semitones < (steps[half - 1] + steps[half]) / 2:
        mel = nearest_bank(power, semitones, steps[:half], sample_rate, n_mels)
    else:
        mel = nearest_bank(power, semitones, steps[half:], sample_rate, n_mels)
    return mel


def time_scale(mel: DataNode, factor: DataNode, frames: int, n_mels: int) -> DataNode:
    """Frame t of the result `(frames, n_mels)` is frame `t * factor` of `mel (F, n_mels)`, interpolated linearly.

    This is the time stretch. Interpolating the mel power equals interpolating the power spectrogram before the mel
    filters, since those are linear along frequency.
    """
    # DALI's pixel centres lie at +0.5: scaling about (0.5, 0.5) keeps frame 0 in place.
    matrix = fn.transforms.scale(scale=fn.stack(types.Constant(np.float32(1), device="cpu"), factor), center=[0.5, 0.5])
    image = fn.reshape(fn.expand_dims(mel, axes=[2]), layout="HWC")
    image = fn.warp_affine(
        image, matrix=matrix, size=(frames, n_mels), inverse_map=True, interp_type=types.INTERP_LINEAR
    )
    return fn.reshape(image, shape=[frames, n_mels], layout="")


def reverb(mel: DataNode, rt60: DataNode, drr_db: DataNode, max_rt60: float, hop_seconds: float, gpu: bool) -> DataNode:
    """Add a room's late reverberation to the mel power `(F, n_mels)`.

    The tail of a room's impulse response is noise under an exponential decay (Polack 1988; Habets 2007, section 2.2),
    so in expectation its energy is the signal's energy convolved along time with that decay: 60 dB in `rt60` seconds.
    The tail holds 10^(-drr_db / 10) of the direct sound's energy.
    """
    taps = int(np.ceil(max_rt60 / hop_seconds)) + 1
    # `fn.filter` correlates: the kernel is reversed, with its anchor on the last tap, which is the direct sound.
    delay = np.arange(taps, dtype=np.float32)[::-1, None].copy()
    decay = math.exp(types.Constant(delay * np.float32(-DECAY_60_DB * hop_seconds), device="cpu") / rt60)
    tail = decay * types.Constant((delay > 0).astype(np.float32), device="cpu")
    level = math.pow(10.0, drr_db / -10.0) / fn.reductions.sum(tail)
    kernel = tail * level + types.Constant((delay == 0).astype(np.float32), device="cpu")
    return fn.filter(mel, kernel.gpu() if gpu else kernel, anchor=[taps - 1, 0], border="fill")


def gain(mel: DataNode, gain_db: DataNode) -> DataNode:
    """Change the volume by `gain_db`: exact as a factor on the power."""
    return mel * math.pow(10.0, gain_db / 10.0)


def spec_augment(log_mel: DataNode, draws: Draws) -> DataNode:
    """Set one band of mel bins and one range of frames of the normalised `(F, n_mels)` to 0, its mean."""
    frames, n_mels = (log_mel.shape(dtype=types.FLOAT)[axis] for axis in (0, 1))
    zero = types.Constant(np.float32(0), device="cpu")
    return fn.erase(  # two regions in one pass: all mel bins of some frames, and all frames of some mel bins
        log_mel,
        anchor=fn.stack(draws.time_start, zero, zero, draws.mel_start),
        shape=fn.stack(draws.time_width, n_mels, frames, draws.mel_width),
        axes=[0, 1],
        fill_value=0.0,
    )
