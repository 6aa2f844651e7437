"""BYOL's target follows the encoder as in its paper, and what it teaches."""

from pathlib import Path

import pytest
import torch
from helpers.learned import same_artist_is_nearer
from helpers.running import train

from simsiam_dali.config.load import load_config
from simsiam_dali.models.byol import Byol
from simsiam_dali.models.losses import simsiam_loss

SMALL = ["encoder.simsiam.backbone=resnet18", "encoder.simsiam.backbone_width=8", "encoder.simsiam.projection_dim=16"]


def create(momentum: float) -> Byol:
    """A narrow one."""
    torch.manual_seed(0)
    config = load_config(assignments=[*SMALL, f"encoder.byol.momentum={momentum}", "encoder.encoder_type=byol"])
    return Byol(config, pretrained=False)


def views() -> torch.Tensor:
    """Two of 4 segments."""
    return torch.randn(2, 4, 32, 40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_target_is_a_moving_average(momentum: float) -> None:
    byol = create(momentum)
    start = {name: p.clone() for name, p in byol.target.named_parameters()}
    with torch.no_grad():
        for parameter in byol.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    for step in (1, 2):
        byol.after_step()
        moved = 1 - momentum**step  # of the way to the encoder
        for name, parameter in byol.target.named_parameters():
            torch.testing.assert_close(parameter, start[name] + moved)


def test_the_target_starts_as_the_encoder_and_gets_no_gradient() -> None:
    byol = create(0.99)
    *p, z1, z2 = byol(*views())
    for view, z in zip(views(), (z1, z2), strict=True):
        torch.testing.assert_close(z, byol.projector(byol.features(view)))
    simsiam_loss(p, (z1, z2)).backward()
    learned = {id(p) for group in byol.param_groups() for p in group["params"]}
    for name, parameter in byol.named_parameters():
        if name.startswith("target."):
            assert parameter.grad is None
            assert id(parameter) not in learned
        else:
            assert parameter.grad is not None
            assert id(parameter) in learned


def test_it_learns_which_songs_are_by_one_artist(tmp_path: Path, small_shards: Path) -> None:
    over = {"encoder__epochs": 20, "encoder__batch_size": 10, "encoder__simsiam__learning_rate": 0.5}
    own = {"encoder__encoder_type": "byol", "encoder__byol__momentum": 0.9, "train__validate_every": 100}
    run_dir = train(tmp_path, small_shards, **over, **own)
    untrained, trained = (same_artist_is_nearer(run_dir, small_shards, trained) for trained in (False, True))
    assert trained > untrained + 0.1
