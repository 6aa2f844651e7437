"""The vectors that are searched: standardised, half-whitened, of length 1."""

import numpy as np
import pytest

from simsiam_dali.evaluation import knn

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("songs", [30, 60, 200], ids=["fewer songs than dimensions", "as many", "more"])
def test_half_whitened_components_have_the_root_of_their_standard_deviation(songs: int) -> None:
    x = RNG.standard_normal((songs, 60)) * np.geomspace(1, 30, 60)
    x -= x.mean(axis=0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    found = knn.half_whitened(x)
    np.testing.assert_allclose(found @ found.T, (u * s) @ u.T * songs**0.5, atol=1e-6)
    variance = np.sort(np.linalg.eigvalsh(np.cov(found.T, bias=True)))[::-1][: songs - 1]
    np.testing.assert_allclose(variance, (s / songs**0.5)[: songs - 1], atol=1e-6)


def test_directions_of_no_variance_add_nothing() -> None:
    """A column that is the sum of others leaves a component of rounding errors, which no scale may raise."""
    x = RNG.standard_normal((100, 4))
    more = np.column_stack([x, x @ [1, 2, 3, 4], np.full(100, 7.0)])
    found = knn.unit(more)
    assert found.shape == more.shape
    assert np.count_nonzero(found.any(axis=0)) == 4


@pytest.mark.parametrize(("songs", "dims"), [(190, 512), (600, 512)])
def test_vectors_of_low_rank_are_compared_without_rounding_errors(songs: int, dims: int) -> None:
    x = RNG.standard_normal((songs, 3)) @ RNG.standard_normal((3, dims))
    x[1] = x[0]
    scaled = (x - x.mean(axis=0)) / x.std(axis=0)
    u, s, _ = np.linalg.svd(scaled, full_matrices=False)
    expected = knn.l2_normalised((u * s**0.5)[:, :3])
    found = knn.unit(x)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)
    assert found[0] @ found[1] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 5), (3, 5), (9, 5)])
def test_equal_songs_are_finite_zeros(shape: tuple[int, int]) -> None:
    found = knn.unit(np.ones(shape))
    assert len(found) == len(np.ones(shape))
    assert found.shape[1] > 0
    assert not found.any()


def test_the_directions_that_hold_most_of_the_variance_no_longer_decide_alone() -> None:
    """Sixty numbers repeat three that have nothing to do with a song's group; eight tell the ten groups apart."""
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(10), 4)
    loud = np.repeat(rng.standard_normal((40, 3)), 20, axis=1) + 0.1 * rng.standard_normal((40, 60))
    own = rng.standard_normal((10, 8))[group] + 0.3 * rng.standard_normal((40, 8))
    x = np.column_stack([loud, own])
    hits = {}
    for whiten in (False, True):
        cosine = knn.unit(x, whiten=whiten) @ knn.unit(x, whiten=whiten).T
        np.fill_diagonal(cosine, -1)
        hits[whiten] = (group[cosine.argmax(axis=1)] == group).sum()
    assert hits[True] > 1.5 * hits[False]
