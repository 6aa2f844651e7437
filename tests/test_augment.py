"""Each augmentation with a known draw on a signal with a known answer, and the draws themselves."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from helpers.signals import (
    HOP,
    RATE,
    Array,
    augmented,
    clicks,
    frequency,
    noise,
    power,
    reference_log_mel,
    reference_mel,
    run_graph,
    song,
    tone,
)
from nvidia.dali import fn, pipeline_def, types

from simsiam_dali.config.schema import AugmentationConfig
from simsiam_dali.data import augment
from simsiam_dali.data.graph import LogMel

SECONDS = 6.0
FRAMES = LogMel().frames(SECONDS)
SEMITONES = (-2.0, -1.37, -0.5, 0.0, 0.61, 1.0, 2.0)
RATES = (0.8, 0.93, 1.0, 1.1, 1.2)


def period(view: Array, about: float) -> float:
    """Seconds between the clicks in a log-mel in dB: the strongest repetition within 10% of `about`."""
    envelope = power(view).sum(axis=0)
    envelope -= envelope.mean()
    rates = np.linspace(0.9, 1.1, 2001) / about
    times = np.arange(len(envelope)) * HOP / RATE
    return float(1 / rates[np.argmax(np.abs(np.exp(-2j * np.pi * rates[:, None] * times) @ envelope))])


# --- pitch and tempo


def test_a_tone_moves_by_the_semitones_drawn_whatever_the_tempo() -> None:
    draws = [{"semitones": s, "rate": r} for s in SEMITONES for r in (0.8, 1.0, 1.2)]
    level = reference_mel(tone(2000.0, SECONDS))[:, 4:-4].sum(axis=0).mean()
    for draw, view in zip(draws, augmented([tone(2000.0, SECONDS)] * len(draws), draws), strict=True):
        assert view.shape == (128, FRAMES)
        assert 12 * np.log2(frequency(view) / 2000.0) == pytest.approx(draw["semitones"], abs=0.1), draw
        assert 10 * np.log10(power(view)[:, 4:-4].sum(axis=0).mean() / level) == pytest.approx(0, abs=0.02), draw


def test_a_click_track_changes_tempo_by_the_rate_drawn_whatever_the_pitch() -> None:
    # The period divides the view, so that the sound which comes round the end goes on in time.
    draws = [{"semitones": s, "rate": r} for s in (-2.0, 0.0, 1.37) for r in RATES]
    for draw, view in zip(draws, augmented([clicks(0.25, SECONDS)] * len(draws), draws), strict=True):
        assert view.shape == (128, FRAMES)
        assert period(view, 0.25 / draw["rate"]) == pytest.approx(0.25 / draw["rate"], rel=0.01), draw


def test_the_interpolation_is_linear_in_time() -> None:
    mel = np.random.default_rng(0).random((100, 16), np.float32)
    factors = list(np.array((0.8, 0.97, 1.0, 1.07), np.float32))
    inputs = {"mel": [mel] * len(factors), "factor": factors}
    results = run_graph(lambda mel, factor: augment.time_scale(mel, factor, 90, 16), inputs)[0]
    for factor, result in zip(factors, results, strict=True):
        times = np.arange(90) * factor
        expected = [np.interp(times, np.arange(100), column) for column in mel.T]
        np.testing.assert_allclose(result, np.transpose(expected), atol=2e-5)


# --- time shift


def test_circular_slice_wraps_around_the_end() -> None:
    x = np.arange(10, dtype=np.float32)
    cases = [(0, 10), (3, 10), (10, 10), (9, 10), (0, 12), (10, 12), (7, 20), (10, 20), (2, 3), (9, 1), (8, 19)]
    starts, lengths = (list(np.array(column, np.int32)) for column in zip(*cases, strict=True))
    results = run_graph(
        lambda x, start, length: augment.circular_slice(x, start, length, passes=3),
        {"x": [x] * len(cases), "start": starts, "length": lengths},
    )[0]
    for (start, length), result in zip(cases, results, strict=True):
        np.testing.assert_array_equal(result, x[(start + np.arange(length)) % 10], err_msg=f"{start}, {length}")


def test_circular_slice_skips_what_the_end_repeats() -> None:
    ring = np.arange(9, dtype=np.float32)
    x = np.append(ring, ring[0])  # as the last frame of a view shows the place where the first begins
    cases = [(0, 10), (3, 10), (8, 10), (9, 10), (4, 20)]
    starts, lengths = (list(np.array(column, np.int32)) for column in zip(*cases, strict=True))
    results = run_graph(
        lambda x, start, length: augment.circular_slice(x, start, length, passes=4, overlap_frames=1),
        {"x": [x] * len(cases), "start": starts, "length": lengths},
    )[0]
    for (start, length), result in zip(cases, results, strict=True):
        np.testing.assert_array_equal(result, ring[(start + np.arange(length)) % 9], err_msg=f"{start}, {length}")


@pytest.mark.parametrize("samples", [150 * HOP, 150 * HOP + 100])
def test_the_shift_is_circular_by_whole_frames(samples: int) -> None:
    wave, hops = song(5.0, seed=1)[:samples], (0, 1, 40, 75, 120)
    views = augmented([wave] * len(hops), [{"shift": h / 150} for h in hops])
    for shift, view in zip(hops, views, strict=True):
        rolled = np.roll(wave, -shift * HOP)
        expected = reference_log_mel(rolled)
        assert view.shape == expected.shape == (128, 151)
        # Windows of two frames and less from an end of the wave hold what is mirrored there: at the ends of
        # `expected`, and in the view at the seam. Behind it, the view is late by what does not fill a hop.
        frames = np.arange(151)
        seam = 150 - shift
        away = (frames > 2) & (frames < 148) & (np.abs(frames - seam) > 2)
        if samples % HOP:
            away &= frames < seam
        if shift == 0:
            away[:] = True
        loud = (expected > -40) & away
        assert loud.any()
        np.testing.assert_allclose(view[loud], expected[loud], atol=0.01)


# --- noise


def test_noise_is_white_gaussian_at_the_snr_drawn() -> None:
    bank = np.random.default_rng(0).standard_normal(round(1.5 * SECONDS * RATE), np.float32)
    snrs, places = (-3.0, 15.0, 22.5, 30.0), (0.0, 0.35, 0.7, 0.999)
    wave = song(SECONDS, seed=2)
    inputs = {"x": [wave] * 4, "snr": list(np.array(snrs, np.float32)), "at": list(np.array(places, np.float32))}
    results = run_graph(lambda x, snr, at: augment.add_noise(x, snr, types.Constant(bank, device="cpu"), at), inputs)[0]
    added = [result.astype(np.float64) - wave for result in results]
    for snr, each in zip(snrs, added, strict=True):
        # 96,000 samples measure the power within 0.02 dB (one sigma); 12,000 FFT bins a band within 0.04 dB.
        assert 10 * np.log10(np.mean(wave.astype(np.float64) ** 2) / np.mean(each**2)) == pytest.approx(snr, abs=0.1)
        bands = (np.abs(np.fft.rfft(each)[1:]) ** 2).reshape(-1)[: 8 * 6000].reshape(8, 6000).mean(axis=1)
        assert 10 * np.log10(bands / bands.mean()) == pytest.approx(np.zeros(8), abs=0.25)
        assert np.mean(each**4) / np.mean(each**2) ** 2 == pytest.approx(3, abs=0.1)  # a Gaussian's kurtosis
    assert abs(np.asarray(np.corrcoef(added))[np.triu_indices(4, 1)]).max() < 0.02  # each place has noise of its own


def test_a_view_gets_noise_at_its_snr_after_pitch_and_tempo() -> None:
    bank = np.random.default_rng(0).standard_normal(round(3 * SECONDS * RATE), np.float32)
    draws = [
        {"noisy": True, "snr_db": snr, "noise_at": 0.3, "rate": rate, "semitones": semitones}
        for snr, rate, semitones in ((15.0, 1.0, 0.0), (20.0, 1.2, 0.0), (25.0, 0.8, -2.0), (30.0, 1.0, 2.0))
    ]
    wave = tone(500.0, SECONDS)
    views = augmented([wave] * len(draws), draws, bank=bank)
    for draw, view in zip(draws, views, strict=True):
        level = np.sqrt(np.mean(wave**2)) * 10 ** (-draw["snr_db"] / 20)
        expected = reference_mel(level * bank[: len(wave)])
        quiet = slice(64, 128)  # mel bins well above the tone; half a million values of noise each
        ratio = power(view)[quiet, 8:-8].mean() / expected[quiet, 8:-8].mean()
        assert 10 * np.log10(ratio) == pytest.approx(0, abs=0.25), draw


# --- gain


def test_gain_moves_the_log_mel_by_the_decibels_drawn() -> None:
    gains = (-6.0, -2.5, 0.0, 6.0)
    views = augmented([noise(SECONDS)] * len(gains), [{"gain_db": g} for g in gains])
    plain = views[gains.index(0.0)]
    for gain_db, view in zip(gains, views, strict=True):
        np.testing.assert_allclose(view - plain, gain_db, atol=1e-3)  # float32: 30 dB hold steps of 4e-6 dB


# --- reverb


def test_the_reverb_tail_decays_by_60_db_in_rt60_and_holds_the_energy_drawn() -> None:
    wave = np.zeros(round(SECONDS * RATE), np.float32)
    wave[RATE] = 1.0
    dry = reference_mel(wave).sum(axis=0)
    draws = [{"reverberant": True, "rt60": rt60, "drr_db": drr} for rt60 in (0.2, 0.5, 1.2) for drr in (0.0, 6.0, 12.0)]
    for draw, view in zip(draws, augmented([wave] * len(draws), draws), strict=True):
        envelope = power(np.where(view > -99, view, -np.inf)).sum(axis=0)
        # Energy of the tail against the direct sound's, over all time.
        tail = envelope.sum() - dry.sum()
        assert 10 * np.log10(dry.sum() / tail) == pytest.approx(draw["drr_db"], abs=0.2), draw
        # The direct sound fills the frames whose window holds it; after them there is only the tail.
        start = np.flatnonzero(dry > 1e-9)[-1] + 1
        length = max(4, int(0.5 * draw["rt60"] * RATE / HOP))  # 30 dB of the decay
        times = np.arange(start, start + length) * HOP / RATE
        slope = np.polyfit(times, 10 * np.log10(envelope[start : start + length]), 1)[0]
        assert -60 / slope == pytest.approx(draw["rt60"], rel=0.02), draw
        # Nothing sounds before its cause.
        before = np.flatnonzero(dry > 1e-9)[0]
        assert envelope[:before].sum() == 0


# --- SpecAugment


def test_masks_are_one_band_and_one_range_of_frames_at_the_mean() -> None:
    spec = LogMel(mean=-30.0, std=15.0)
    sizes = [(10, 27, 5, 100), (101, 27, FRAMES - 100, 100), (0, 1, 0, 1), (50, 9, 30, 0), (50, 0, 30, 7), (3, 0, 3, 0)]
    draws: list[dict[str, float]] = [{}]
    for mel_start, mel_width, time_start, time_width in sizes:
        masks = {"mel_start": mel_start, "mel_width": mel_width}
        draws.append({**masks, "time_start": time_start, "time_width": time_width})
    plain, *views = augmented([noise(SECONDS)] * len(draws), draws, spec)
    assert (plain != 0).all()
    for (mel_start, mel_width, time_start, time_width), view in zip(sizes, views, strict=True):
        expected = plain.copy()
        expected[mel_start : mel_start + mel_width] = 0
        expected[:, time_start : time_start + time_width] = 0
        np.testing.assert_array_equal(view, expected)


# --- draws

SAMPLES = 2000


def drawn(cfg: AugmentationConfig, seed: int = 0, frames: int = 1876) -> dict[str, Array]:
    """What `SAMPLES` views drew: name -> (SAMPLES,). Without mixup and crop (tests/test_mixing.py)."""
    names = [field.name for field in dataclasses.fields(augment.Draws) if field.default is dataclasses.MISSING]

    @pipeline_def(batch_size=SAMPLES, num_threads=2, device_id=None, enable_conditionals=True)
    def graph() -> tuple[Any, ...]:
        draws = augment.draw(cfg, frames, 128, seed)
        return tuple(fn.cast(getattr(draws, name), dtype=types.FLOAT) for name in names)

    pipeline = graph()
    pipeline.build()
    return {name: np.array(x.as_array()).reshape(-1) for name, x in zip(names, pipeline.run(), strict=True)}


OTHER_RANGES: dict[str, Any] = {
    "time_shift_range": (0.2, 0.4),
    "time_stretch_range": (0.9, 1.05),
    "pitch_shift_range": (-1, 3),
    "gain_range": (-12, -2),
    "noise_snr_range": (3, 8),
    "reverb_rt60_range": (0.5, 0.9),
    "reverb_drr_range": (4, 6),
}


@pytest.mark.parametrize("ranges", [{}, OTHER_RANGES], ids=["default", "other"])
def test_each_augmentation_is_drawn_at_its_probability_and_within_its_range(ranges: dict[str, Any]) -> None:
    cfg = AugmentationConfig(time_shift_prob=0.6, **ranges)
    d = drawn(cfg)
    rates = {
        "time shift": (d["shift"] != 0, cfg.time_shift_prob),
        "time stretch": (d["rate"] != 1, cfg.time_stretch_prob),
        "pitch shift": (d["semitones"] != 0, cfg.pitch_shift_prob),
        "noise": (d["noisy"] != 0, cfg.noise_prob),
        "gain": (d["gain_db"] != 0, cfg.gain_prob),
        "reverb": (d["reverberant"] != 0, cfg.reverb_prob),
        # A mask that is drawn has width 0 once in param + 1 times.
        "frequency mask": (d["mel_width"] != 0, cfg.frequency_mask_prob * 27 / 28),
        "time mask": (d["time_width"] != 0, cfg.time_mask_prob * 100 / 101),
    }
    for name, (hits, probability) in rates.items():
        # Four sigma of a binomial: the seed is fixed, a fair graph fails for one seed in 2,000.
        bound = 4 * np.sqrt(probability * (1 - probability) / SAMPLES)
        assert hits.mean() == pytest.approx(probability, abs=bound), name
    assert np.array_equal(d["stretched"] != 0, d["rate"] != 1)

    def uniform(values: Array, low: float, high: float) -> None:
        assert low <= values.min() <= low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) <= values.max() <= high
        sigma = (high - low) / np.sqrt(12 * len(values))
        assert values.mean() == pytest.approx((low + high) / 2, abs=4 * sigma)

    uniform(d["shift"][d["shift"] != 0], *ranges.get("time_shift_range", (0, 1)))
    uniform(d["rate"][d["rate"] != 1], *ranges.get("time_stretch_range", (0.8, 1.2)))
    uniform(d["semitones"][d["semitones"] != 0], *ranges.get("pitch_shift_range", (-2, 2)))
    uniform(d["gain_db"][d["gain_db"] != 0], *ranges.get("gain_range", (-6, 6)))
    uniform(d["snr_db"], *ranges.get("noise_snr_range", (15, 30)))
    uniform(d["noise_at"], 0, 1)
    uniform(d["rt60"], *ranges.get("reverb_rt60_range", (0.2, 1.2)))
    uniform(d["drr_db"], *ranges.get("reverb_drr_range", (0, 12)))


def test_masks_are_drawn_within_their_widths_and_inside_the_view() -> None:
    cfg = AugmentationConfig(frequency_mask_prob=1.0, time_mask_prob=1.0, time_mask_param=20)
    d = drawn(cfg, frames=188)
    for axis, param, size in (("mel", 27, 128), ("time", 20, 188)):
        start, width = d[f"{axis}_start"], d[f"{axis}_width"]
        assert set(np.unique(width)) == set(range(param + 1))  # each of 28 misses in 2,000 with 1e-31
        assert np.array_equal(start, np.floor(start))
        assert start.min() == 0
        assert (start + width).max() == size
    # Wider than the view: the whole view at most.
    wide = drawn(AugmentationConfig(frequency_mask_prob=1.0, frequency_mask_param=500), frames=188)
    assert wide["mel_width"].max() == 128
    assert (wide["mel_start"] + wide["mel_width"]).max() == 128


def test_spec_augment_false_masks_nothing_and_changes_no_other_draw() -> None:
    with_masks, without = drawn(AugmentationConfig()), drawn(AugmentationConfig(spec_augment=False))
    for name in with_masks:
        if name in ("mel_width", "time_width"):
            assert (without[name] == 0).all()
        elif not name.endswith("start"):
            np.testing.assert_array_equal(with_masks[name], without[name], err_msg=name)


def test_draws_are_independent_of_each_other_between_samples_and_between_views() -> None:
    names = ("time_shift", "time_stretch", "pitch_shift", "noise", "gain", "reverb", "frequency_mask", "time_mask")
    cfg = AugmentationConfig(**{f"{name}_prob": 1.0 for name in names})
    columns = []
    for number in (1, 2):
        d = drawn(cfg, seed=augment.derive_seed(7, f"view {number}"))
        for axis, size in (("mel", 128), ("time", 1876)):
            # Where it starts depends on its width; which of the possible places it takes does not.
            d[f"{axis}_start"] /= size + 1 - d[f"{axis}_width"]
        columns += [values for values in d.values() if values.std() > 0]
    assert len(columns) == 2 * 12
    # Five sigma of the correlation of 2,000 independent pairs.
    assert np.abs(np.corrcoef(columns) - np.eye(len(columns))).max() < 5 / np.sqrt(SAMPLES)
    # Whether each augmentation is drawn at all.
    hits = []
    for number in (1, 2):
        d = drawn(AugmentationConfig(spec_augment=True, time_shift_prob=0.5), augment.derive_seed(7, f"view {number}"))
        hits += [
            d[n] != 0 for n in ("shift", "semitones", "noisy", "gain_db", "reverberant", "mel_width", "time_width")
        ]
        hits.append(d["rate"] != 1)
    assert np.abs(np.corrcoef(hits) - np.eye(len(hits))).max() < 5 / np.sqrt(SAMPLES)
    # Neighbouring samples of a batch.
    assert max(abs(np.corrcoef(c[1:], c[:-1])[0, 1]) for c in columns) < 5 / np.sqrt(SAMPLES)


def test_one_seed_gives_one_set_of_draws() -> None:
    first, again, other = (drawn(AugmentationConfig(), seed) for seed in (3, 3, 4))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])


def test_a_range_of_one_value_and_probability_zero() -> None:
    off = {f"{name}_prob": 0.0 for name in ("time_shift", "noise", "gain", "reverb", "frequency_mask", "time_mask")}
    fixed = {"time_stretch_range": (1.1, 1.1), "pitch_shift_range": (-1.0, -1.0)}
    d = drawn(AugmentationConfig(**off, **fixed, time_stretch_prob=1.0, pitch_shift_prob=1.0))
    np.testing.assert_allclose(d["rate"], 1.1, rtol=1e-6)
    np.testing.assert_allclose(d["semitones"], -1.0)
    for name in ("shift", "noisy", "gain_db", "reverberant", "mel_width", "time_width"):
        assert (d[name] == 0).all(), name
