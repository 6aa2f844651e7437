"""The contrastive encoder's loss is that of its paper, and it learns which songs are alike without being told."""

import math
from pathlib import Path

import pytest
import torch
from helpers.learned import same_artist_is_nearer
from helpers.running import train
from torch import Tensor

from simsiam_dali.models.losses import nt_xent


def double_loop(z: Tensor, temperature: float) -> float:
    """Algorithm 1 of arXiv:2002.05709, row by row; of more than two views the mean over a row's other views."""
    rows = [row / row.norm() for view in z.double() for row in view]
    n, total = z.shape[1], 0.0
    for i, own in enumerate(rows):
        similarity = [math.exp(float(own @ other) / temperature) for other in rows]
        partners = [other for other in range(len(rows)) if other % n == i % n and other != i]
        shares = [similarity[partner] / (sum(similarity) - similarity[i]) for partner in partners]
        total -= sum(map(math.log, shares)) / len(shares)
    return total / len(rows)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_the_loss_equals_the_double_loop(temperature: float, views: int) -> None:
    z = torch.randn(views, 7, 5, generator=torch.Generator().manual_seed(0))
    assert nt_xent(list(z), temperature).item() == pytest.approx(double_loop(z, temperature), rel=1e-5)


def test_the_gradient_is_finite_and_moves_the_views_of_a_segment_together() -> None:
    z1, z2 = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(nt_xent((z1, z2), 0.2), z1, retain_graph=True)
    assert gradient.isfinite().all()
    nearer = nt_xent(((z1 - 0.1 * gradient).detach(), z2), 0.2)
    assert nearer < nt_xent((z1, z2), 0.2)


def test_views_that_agree_and_segments_that_differ_cost_nothing() -> None:
    one_each = torch.eye(4)
    assert nt_xent((one_each, one_each), 0.01).item() == pytest.approx(0, abs=1e-6)
    all_equal = torch.ones(4, 4)
    assert nt_xent((all_equal, all_equal), 0.01).item() == pytest.approx(math.log(7))


def test_the_loss_is_float32_under_autocast() -> None:
    z1, z2 = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    plain = nt_xent((z1, z2), 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nt_xent((z1, z2), 0.1)
    assert inside.dtype == torch.float32
    assert inside.item() == plain.item()


def test_it_learns_which_songs_are_by_one_artist(tmp_path: Path, small_shards: Path) -> None:
    over = {"encoder__epochs": 20, "encoder__batch_size": 10, "encoder__simsiam__learning_rate": 0.5}
    own = {"encoder__encoder_type": "contrastive", "train__validate_every": 100}
    run_dir = train(tmp_path, small_shards, **over, **own)
    untrained, trained = (same_artist_is_nearer(run_dir, small_shards, trained) for trained in (False, True))
    assert trained > untrained + 0.1
