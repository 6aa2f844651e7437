"""Hubness against counting by hand, and where there is none: on a ring."""

import numpy as np
import pytest

from simsiam_dali.evaluation.hubness import hubness
from simsiam_dali.evaluation.knn import unit


def test_a_ring_has_no_hub_and_leaves_out_nobody() -> None:
    """Each of 24 evenly spaced points has its two neighbours on the ring, and is near to those two."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False) + 0.1
    ring = np.column_stack([np.cos(angle), np.sin(angle)])
    found = hubness(ring, np.arange(24), k=2)
    assert found.skewness == pytest.approx(0, abs=1e-9)
    assert found.never == 0


def test_both_measures_equal_counting_song_by_song() -> None:
    rng = np.random.default_rng(0)
    x, group, k = rng.standard_t(1.5, (60, 40)), np.arange(60) // 2, 5
    cosine = unit(x) @ unit(x).T
    count = np.zeros(60)
    for row in range(60):
        others = [other for other in range(60) if group[other] != group[row]]
        for other in sorted(others, key=lambda other: -cosine[row, other])[:k]:
            count[other] += 1
    found = hubness(unit(x), group, k)
    assert found.never == (count == 0).mean() > 0
    assert found.skewness == pytest.approx(((count - count.mean()) ** 3).mean() / count.std() ** 3)
