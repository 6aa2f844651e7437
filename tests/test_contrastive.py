"""The contrastive encoder's loss is that of its paper, and it learns which songs are alike without being told."""

import math
from pathlib import Path

import pytest
import torch
from helpers.learned import same_artist_is_nearer
from helpers.running import train
from torch import Tensor

from simsiam_dali.models.losses import nt_xent


def double_loop(z1: Tensor, z2: Tensor, temperature: float) -> float:
    """Algorithm 1 of arXiv:2002.05709, row by row."""
    rows = [row / row.norm() for row in (*z1.double(), *z2.double())]
    n, total = len(z1), 0.0
    for i, own in enumerate(rows):
        similarity = [math.exp(float(own @ other) / temperature) for other in rows]
        partner = (i + n) % (2 * n)
        total -= math.log(similarity[partner] / (sum(similarity) - similarity[i]))
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_the_loss_equals_the_double_loop(temperature: float) -> None:
    z1, z2 = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(double_loop(z1, z2, temperature), rel=1e-5)


def test_views_that_agree_and_segments_that_differ_cost_nothing() -> None:
    one_each = torch.eye(4)
    assert nt_xent(one_each, one_each, 0.01).item() == pytest.approx(0, abs=1e-6)
    all_equal = torch.ones(4, 4)
    assert nt_xent(all_equal, all_equal, 0.01).item() == pytest.approx(math.log(7))


def test_the_loss_is_float32_under_autocast() -> None:
    z1, z2 = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    plain = nt_xent(z1, z2, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nt_xent(z1, z2, 0.1)
    assert inside.dtype == torch.float32
    assert inside.item() == plain.item()


def test_it_learns_which_songs_are_by_one_artist(tmp_path: Path, small_shards: Path) -> None:
    over = {"encoder__epochs": 20, "encoder__batch_size": 10, "encoder__simsiam__learning_rate": 0.5}
    own = {"encoder__encoder_type": "contrastive", "train__validate_every": 100}
    run_dir = train(tmp_path, small_shards, **over, **own)
    untrained, trained = (same_artist_is_nearer(run_dir, small_shards, trained) for trained in (False, True))
    assert trained > untrained + 0.1
