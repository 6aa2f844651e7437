"""The map's first positions: principal components, of narrow vectors and of wide ones."""

import numpy as np
import pytest

from simsiam_dali.serving.positions import principal_components


@pytest.mark.parametrize(("songs", "dims"), [(200, 12), (60, 400), (40, 1), (1, 30)])
def test_positions_are_the_first_two_principal_components(songs: int, dims: int) -> None:
    rng = np.random.default_rng(0)
    scale = np.r_[9, 5, np.ones(dims)][:dims]
    vectors = (rng.standard_normal((songs, dims)) * scale @ rng.standard_normal((dims, dims))).astype(np.float32)
    x = (vectors - vectors.mean(axis=0)) / np.where(vectors.std(axis=0) > 0, vectors.std(axis=0), 1)
    x /= np.linalg.norm(x, axis=1, keepdims=True).clip(min=1e-12)
    expected = x @ np.linalg.svd(x - x.mean(axis=0))[2][:2].T

    points = principal_components(vectors)

    assert (points.shape, points.dtype) == ((songs, 2), np.float32)
    assert np.abs(points).max() <= 1
    for own, component in zip(points.T, expected.T, strict=False):
        if np.ptp(component) > 1e-6:
            assert abs(np.corrcoef(own, component)[0, 1]) > 0.999


def test_wide_vectors_on_a_line_have_no_second_component() -> None:
    vectors = np.outer(np.arange(50.0), np.random.default_rng(0).standard_normal(500)).astype(np.float32)
    points = principal_components(vectors)
    assert np.ptp(points[:, 0]) == 2
    assert np.ptp(points[:, 1]) < 0.01


def test_of_more_numbers_than_are_looked_at_all_songs_have_a_position() -> None:
    vectors = np.random.default_rng(0).standard_normal((3000, 2000), dtype=np.float32)
    vectors[1500:, :1000] += 3  # two groups
    points = principal_components(vectors)
    assert points.shape == (3000, 2)
    sides = np.sign(points[:, 0])
    assert abs(sides[:1500].sum() - sides[1500:].sum()) == 3000
