"""Mixup and the resized crop on signals with known answers, and what they draw."""

from typing import Any

import numpy as np
import pytest
from helpers.signals import Array, run_graph
from nvidia.dali import fn, pipeline_def, types
from scipy.interpolate import RegularGridInterpolator

from simsiam_dali.config.schema import AugmentationConfig
from simsiam_dali.data import augment, mixing

FRAMES, MELS = 40, 16


def batch(number: int) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.random((FRAMES, MELS), np.float32) for _ in range(number)]


def scalars(values: tuple[float, ...]) -> list[Array]:
    return [np.float32(value) for value in values]  # type: ignore[misc]


def test_mixup_adds_the_other_segment_s_share_of_the_power() -> None:
    mels, shares, others = batch(4), (0.0, 0.2, 0.4, 1.0), (1, 2, 3, 0)
    inputs: dict[str, list[Any]] = {"mel": mels, "share": scalars(shares), "other": [np.int32(n) for n in others]}
    for number, mixed in enumerate(run_graph(mixing.mixup, inputs)[0]):
        share, other = np.float32(shares[number]), mels[others[number]]
        np.testing.assert_allclose(mixed, mels[number] * (1 - share) + other * share, rtol=1e-6)


def resized(log_mels: list[Array], parts: list[tuple[float, float, float, float]]) -> list[Array]:
    """Each log-mel's crop; parts: where it starts and what it keeps, along time and along frequency."""
    names = ("time", "frames", "bin", "bins")
    inputs = {name: scalars(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)}
    return run_graph(
        lambda x, time, frames, bin, bins: mixing.resized_crop(x, (time, frames), (bin, bins), (FRAMES, MELS)),
        {"x": log_mels, **inputs},
    )[0]


def test_a_crop_is_the_part_interpolated_linearly() -> None:
    parts = [(0.0, 1.0, 0.0, 1.0), (0.5, 0.5, 0.0, 1.0), (0.0, 1.0, 0.3, 0.7), (0.1, 0.6, 0.2, 0.65)]
    log_mels = batch(len(parts))
    for x, part, found in zip(log_mels, parts, resized(log_mels, parts), strict=True):
        time, frames, low, bins = part
        at = np.meshgrid(
            (FRAMES - 1) * (time + frames * np.linspace(0, 1, FRAMES)),
            (MELS - 1) * (low + bins * np.linspace(0, 1, MELS)),
            indexing="ij",
        )
        grid = RegularGridInterpolator((np.arange(FRAMES), np.arange(MELS)), x, bounds_error=False, fill_value=None)
        np.testing.assert_allclose(found, grid(np.stack(at, axis=-1)), atol=2e-5)


def test_a_crop_of_everything_changes_nothing() -> None:
    (x,) = batch(1)
    np.testing.assert_array_equal(resized([x], [(0.0, 1.0, 0.0, 1.0)])[0], x)


def test_a_band_and_a_beat_lie_where_the_crop_puts_them() -> None:
    """What lies in the middle of the part lies in the middle of the view, whatever part it is."""
    x = np.zeros((FRAMES, MELS), np.float32)
    x[26], x[:, 9] = 1.0, 1.0
    time, low = 26 / (FRAMES - 1) - 0.25, 9 / (MELS - 1) - 0.3
    (found,) = resized([x], [(time, 0.5, low, 0.6)])
    inside = found[:5, :].sum(axis=0), found[:, :3].sum(axis=1)
    assert np.average(np.arange(MELS), weights=inside[0]) == pytest.approx((MELS - 1) / 2, abs=1e-4)
    assert np.average(np.arange(FRAMES), weights=inside[1]) == pytest.approx((FRAMES - 1) / 2, abs=1e-4)


BATCH = 500


def drawn(cfg: AugmentationConfig, runs: int = 4) -> dict[str, Array]:
    """What the views of some batches drew: name -> (runs, BATCH)."""

    @pipeline_def(batch_size=BATCH, num_threads=2, device_id=None, enable_conditionals=True)
    def graph() -> tuple[object, ...]:
        draws = augment.draw(cfg, FRAMES, MELS, 0)
        both = (*draws.crop_frames, *draws.crop_mels)
        return tuple(fn.cast(x, dtype=types.FLOAT) for x in (draws.share, draws.other, draws.cropped, *both))

    pipeline = graph()
    pipeline.build()
    outputs = [[np.array(x.as_array()).ravel() for x in pipeline.run()] for _ in range(runs)]
    names = ("share", "other", "cropped", "time", "frames", "low", "bins")
    return {name: np.stack(values) for name, values in zip(names, zip(*outputs, strict=True), strict=True)}


def test_both_are_drawn_at_their_probability_and_within_their_ranges() -> None:
    d = drawn(AugmentationConfig(mixup_prob=0.7, mixup_range=(0.1, 0.4), crop_prob=0.3, crop_range=(0.5, 0.9)))
    bound = 4 * np.sqrt(0.21 / d["share"].size)  # four sigma of a binomial
    assert (d["share"] > 0).mean() == pytest.approx(0.7, abs=bound)
    assert d["cropped"].mean() == pytest.approx(0.3, abs=bound)
    shares = d["share"][d["share"] > 0]
    assert 0.1 <= shares.min() < 0.11
    assert 0.39 < shares.max() <= 0.4
    for start, kept in (("time", "frames"), ("low", "bins")):
        assert 0.5 <= d[kept].min() < 0.51
        assert 0.89 < d[kept].max() <= 0.9
        assert d[start].min() >= 0
        end = d[start] + d[kept]
        assert 0.99 < end.max() <= 1 + 1e-6
    assert abs(np.corrcoef(d["frames"].ravel(), d["bins"].ravel())[0, 1]) < 5 / np.sqrt(d["bins"].size)


def test_a_segment_is_mixed_with_each_other_one_and_never_with_itself() -> None:
    other = drawn(AugmentationConfig(mixup_prob=1.0, crop_prob=1.0))["other"].astype(int)
    for batch_of_places in other:
        assert sorted(batch_of_places) == list(range(BATCH))
        assert (batch_of_places != np.arange(BATCH)).all()
    assert (other[0] != other[1]).any()
    assert abs(np.corrcoef(other[0], np.arange(BATCH))[0, 1]) < 5 / np.sqrt(BATCH)
