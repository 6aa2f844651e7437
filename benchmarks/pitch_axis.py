"""A pitch shift by 33 filter banks, and by one bank behind a scaled frequency axis: `python benchmarks/pitch_axis.py`.

For each way, from the power spectrogram of a view to its mel power, on one core:

    operators    of the graph of one view, its input and the draw of the shift among them
    core-ms      per view, by the process's CPU time; what handing over the input takes is a line of its own
    correlation  mean over shifts, of the log-mel of plucked notes that are shifted with that of notes played higher

docs/gpu.md says what follows from it.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from simsiam_dali.data import augment
from simsiam_dali.data.dali import DataNode, fn, math, pipeline_def, types
from simsiam_dali.data.graph import LogMel
from simsiam_dali.data.views import power_spectrogram

SPEC = LogMel()
BINS = 1 + SPEC.n_fft // 2
SHIFTS = np.array([-2.0, -1.06, 0.43, 1.56], np.float32)  # semitones
STEPS = augment.pitch_steps(-2.0, 2.0)
NOTES_SECONDS = 3.0

Shift = Callable[[DataNode, DataNode, int], DataNode]
"""From a power spectrogram `(F, bins)`, the semitones and F to the mel power `(F, n_mels)`."""


def handed_over(power: DataNode, semitones: DataNode, frames: int) -> DataNode:  # noqa: ARG001
    """Nothing but one pass over the input."""
    return power * 1.0


def banks(power: DataNode, semitones: DataNode, frames: int) -> DataNode:  # noqa: ARG001
    """As the graph does it."""
    return augment.pitched_mel(power, semitones, STEPS, SPEC.sample_rate, SPEC.n_mels)


def one_bank(power: DataNode, semitones: DataNode) -> DataNode:
    """The bank for a power spectrogram whose axis is scaled already: a tone keeps its power, the top is filled."""
    scale = math.pow(2.0, semitones / 12.0)
    # The layout is cleared, since conditionals merge only equal ones.
    mel = fn.reshape(augment.mel_filters(power, SPEC.sample_rate, SPEC.n_mels, 0.0), layout="") / scale
    # Above the last filter that a lowered spectrum reaches, as `augment.mel_filters` drops them.
    edges = 700 * (np.power(1 + SPEC.sample_rate / 1400, np.arange(SPEC.n_mels + 2) / (SPEC.n_mels + 1)) - 1)
    above = types.Constant(edges[2:].astype(np.float32) * np.float32(2 / SPEC.sample_rate), device="cpu")
    whole = augment.integer(fn.reductions.sum(fn.cast(above <= scale, dtype=types.FLOAT)))
    return augment.fill_highest(fn.slice(mel, start=0, end=whole, axes=[1]), SPEC.n_mels)


def warped(power: DataNode, semitones: DataNode, frames: int) -> DataNode:
    """`warp_affine` along frequency."""
    one = types.Constant(np.float32(1), device="cpu")
    scale = fn.stack(math.pow(2.0, semitones / -12.0), one)
    matrix = fn.transforms.scale(scale=scale, center=[0.5, 0.5])  # pixel centres lie at +0.5
    image = fn.reshape(fn.expand_dims(power, axes=[2]), layout="HWC")
    image = fn.warp_affine(image, matrix=matrix, size=(frames, BINS), inverse_map=True, interp_type=types.INTERP_LINEAR)
    return one_bank(fn.reshape(image, shape=[frames, BINS], layout="tf"), semitones)


def resized(power: DataNode, semitones: DataNode, frames: int) -> DataNode:
    """`resize` along frequency, which passes over one axis only; half a bin off, as its edges are not its centres."""
    end = BINS * math.pow(2.0, semitones / -12.0)
    height, zero = (types.Constant(np.float32(x), device="cpu") for x in (frames, 0))
    image = fn.resize(
        fn.reshape(fn.expand_dims(power, axes=[2]), layout="HWC"),
        size=[frames, BINS],
        roi_start=fn.stack(zero, zero),
        roi_end=fn.stack(height, end),
        interp_type=types.INTERP_LINEAR,
        antialias=False,
        dtype=types.FLOAT,
    )
    return one_bank(fn.reshape(image, shape=[frames, BINS], layout="tf"), semitones)


WAYS: dict[str, Shift] = {"handed over": handed_over, "33 banks": banks, "warp_affine": warped, "resize": resized}


def measured(shift: Shift, seconds: float, views: int, batches: int) -> tuple[int, float]:
    """(operators, core-ms a view) on random spectrograms of views of `seconds`."""
    frames = SPEC.frames(seconds)
    rng = np.random.default_rng(0)
    data = [rng.random((frames, BINS), np.float32) for _ in range(views)]

    @pipeline_def(batch_size=views, num_threads=1, device_id=None, enable_conditionals=True, exec_dynamic=True)
    def define() -> DataNode:
        power = fn.external_source(source=lambda: data, layout="tf")
        return shift(power, augment.uniform(STEPS[0], STEPS[-1], 1), frames)

    pipeline = define()
    pipeline.build()
    for _ in range(2):
        pipeline.run()
    began = time.process_time()
    for _ in range(batches):
        pipeline.run()
    return len(pipeline._ops), 1000 * (time.process_time() - began) / (batches * views)


def notes(semitones: float, seed: int) -> np.ndarray:
    """Plucked notes of 29 harmonics over faint noise, float32 `(samples,)`, all of them `semitones` higher."""
    rng, rate = np.random.default_rng(seed), SPEC.sample_rate
    at = np.arange(round(NOTES_SECONDS * rate)) / rate
    wave = np.zeros_like(at)
    for _ in range(12):
        hz = 110 * 2 ** ((rng.integers(0, 36) + semitones) / 12)
        since = at - rng.uniform(0, 2.5)
        envelope = np.where(since > 0, np.exp(-since / rng.uniform(0.1, 0.6)) * np.clip(since / 0.005, 0, 1), 0)
        for harmonic, phase in enumerate(rng.uniform(0, 2 * np.pi, 29), start=1):
            if harmonic * hz < rate / 2:
                wave += envelope / harmonic * np.sin(2 * np.pi * harmonic * hz * at + phase)
    wave *= 0.08 / np.sqrt(np.mean(wave**2))
    return (wave + 0.08 * 10 ** (-50 / 20) * rng.standard_normal(len(wave))).astype(np.float32)


def correlation(shift: Shift) -> float:
    """Mean correlation of notes that are shifted with notes that were played higher, in dB."""
    frames = SPEC.frames(NOTES_SECONDS)

    def log_mel(waves: list[np.ndarray], semitones: np.ndarray, way: Shift) -> list[np.ndarray]:
        @pipeline_def(batch_size=len(waves), num_threads=1, device_id=None, enable_conditionals=True, exec_dynamic=True)
        def define() -> DataNode:
            power = power_spectrogram(fn.external_source(source=lambda: waves), SPEC)
            return way(power, fn.external_source(source=lambda: semitones), frames)

        pipeline = define()
        pipeline.build()
        (mel,) = pipeline.run()
        return [10 * np.log10(np.maximum(np.array(x), 1e-10)) for x in mel]

    shifted = log_mel([notes(0.0, seed) for seed in range(len(SHIFTS))], SHIFTS, shift)
    true = log_mel([notes(float(s), seed) for seed, s in enumerate(SHIFTS)], 0 * SHIFTS, banks)
    return float(np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(shifted, true, strict=True)]))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--view-seconds", type=float, default=60.0, metavar="S", help="(default: %(default)s)")
    parser.add_argument("--views", type=int, default=8, metavar="N", help="of a batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=5, metavar="N", help="batches timed (default: %(default)s)")
    args = parser.parse_args()
    for name, way in WAYS.items():
        operators, cost = measured(way, args.view_seconds, args.views, args.batches)
        told = "" if way is handed_over else f", correlation {correlation(way):.3f}"
        print(f"{name:12} {operators:4} operators, {cost:6.2f} core-ms a view{told}", flush=True)


if __name__ == "__main__":
    main()
