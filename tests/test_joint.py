"""The joint encoder: its loss is the weighted sum of its three, and unknown tags and ratings teach nothing."""

import math
from pathlib import Path

import pytest
import torch
from helpers.learned import same_artist_is_nearer
from helpers.running import train
from torch import Tensor

from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import JointConfig
from simsiam_dali.data.shards import ShardSet, open_shards
from simsiam_dali.models.encoder import LossFn
from simsiam_dali.models.joint import TAG_DIM, Joint
from simsiam_dali.models.labels import SongLabels
from simsiam_dali.models.losses import MetadataContrastiveLoss, nt_xent, rating_loss, simsiam_loss
from simsiam_dali.models.registry import encoder_type

JOINT = {"encoder__encoder_type": "joint"}
SIMSIAM_LOSS = "encoder.joint.views_loss=simsiam"
CPU = torch.device("cpu")


def create(shards: ShardSet, *assignments: str) -> tuple[Joint, LossFn]:
    """A small encoder, and its loss on these shards."""
    config = load_config(
        assignments=[
            "encoder.encoder_type=joint",
            "encoder.simsiam.backbone=resnet18",
            "encoder.simsiam.backbone_width=8",
            "encoder.simsiam.projection_dim=16",
            "encoder.simsiam.predictor_hidden_dim=8",
            *assignments,
        ]
    )
    torch.manual_seed(0)
    kind = encoder_type(config)
    encoder = kind.create()
    assert isinstance(encoder, Joint)
    return encoder, kind.create_loss_fn(shards, CPU)


def outputs(encoder: Joint, batch: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return encoder(*(torch.randn(batch, 16, 40, generator=generator) for _ in range(2)))


def test_a_rating_s_loss_is_the_squared_error_of_what_is_rated() -> None:
    predicted = torch.tensor([0.5, 9.0, 1.0], requires_grad=True)
    loss = rating_loss(predicted, torch.tensor([1.0, math.nan, 0.9]))
    assert loss.item() == pytest.approx((0.25 + 0.01) / 2)
    loss.backward()
    assert predicted.grad is not None
    assert predicted.grad[1] == 0
    assert predicted.grad[0] == pytest.approx(-0.5)


def test_without_any_rating_the_loss_and_its_gradient_are_0() -> None:
    predicted = torch.tensor([0.5, 9.0], requires_grad=True)
    loss = rating_loss(predicted, torch.tensor([math.nan, math.nan]))
    loss.backward()
    assert loss.item() == 0
    assert predicted.grad is not None
    assert not predicted.grad.any()


@pytest.mark.parametrize("views_loss", ["simsiam", "contrastive"])
def test_the_loss_is_the_weighted_sum_of_the_three_teachers(small_shards: Path, views_loss: str) -> None:
    weights = (
        "encoder.joint.tag_weight=0.7",
        "encoder.joint.rating_weight=0.3",
        f"encoder.joint.views_loss={views_loss}",
    )
    shards, segment = open_shards(small_shards), torch.arange(8)
    song = shards.segments["song"].to_numpy()[:8]
    shards.songs.loc[song[0], "rating"] = math.nan
    ratings = torch.tensor(shards.songs["rating"].to_numpy("float32")[song])
    assert 0 < ratings.isnan().sum() < 8
    encoder, score = create(shards, *weights)
    z1, z2, t1, t2, r1, r2, *p = made = outputs(encoder)
    assert len(p) == (2 if views_loss == "simsiam" else 0)
    assert t1.shape == (8, TAG_DIM)
    assert r1.shape == (8,)
    labels = SongLabels.from_songs(shards.songs, shards.segments["song"].to_numpy())
    twice = [torch.cat([own, own]) for own in labels.of(segment)]
    by_tags, _ = MetadataContrastiveLoss(JointConfig())(torch.cat([t1, t2]), *twice)
    by_rating = torch.stack([rating_loss(r, ratings) for r in (r1, r2)]).mean()
    scored = score(made, segment)
    by_views = simsiam_loss(p, (z1, z2)) if p else nt_xent((z1, z2), 0.2)
    assert scored.loss.item() == pytest.approx((by_views + 0.7 * by_tags + 0.3 * by_rating).item())
    assert scored.has_loss
    assert scored.z is z1


def test_every_teacher_reaches_the_backbone_and_every_parameter_is_optimized_once(small_shards: Path) -> None:
    encoder, score = create(open_shards(small_shards), SIMSIAM_LOSS)
    score(outputs(encoder), torch.arange(8)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    grouped = [p for group in encoder.param_groups() for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(encoder.parameters()))
    for name in ("predictor", "tag_head", "rating_head"):
        encoder, _ = create(open_shards(small_shards), SIMSIAM_LOSS)
        for head in {"predictor", "tag_head", "rating_head"} - {name}:
            getattr(encoder, head).requires_grad_(False)
        _, _, t1, _, r1, _, p1, _ = outputs(encoder)
        {"predictor": p1, "tag_head": t1, "rating_head": r1}[name].square().sum().backward()
        stem = next(encoder.backbone.parameters()).grad
        assert stem is not None
        assert stem.any(), name


def test_a_rating_is_read_from_the_direction_of_the_backbones_output_not_its_length(small_shards: Path) -> None:
    encoder, _ = create(open_shards(small_shards))
    h = torch.randn(8, encoder.backbone_dim, generator=torch.Generator().manual_seed(0))
    found = []
    for scale in (1, 1000):
        encoder.backbone.forward = lambda _, scale=scale: 5 + scale * h  # type: ignore[method-assign]
        found.append(outputs(encoder)[4].detach())
    assert found[1] == pytest.approx(found[0], abs=1e-3)
    assert ((found[0] > 0) & (found[0] < 1)).all()


def test_a_checkpoint_from_before_the_ratings_were_standardised_loads(small_shards: Path) -> None:
    encoder, _ = create(open_shards(small_shards))
    former = {name: value for name, value in encoder.state_dict().items() if not name.startswith("rating_norm")}
    assert len(former) < len(encoder.state_dict())
    other, _ = create(open_shards(small_shards))
    other.load_state_dict(former)
    with pytest.raises(RuntimeError, match=r"rating_head\.bias"):
        other.load_state_dict({name: value for name, value in former.items() if name != "rating_head.bias"})


def test_one_song_is_enough_to_validate(small_shards: Path) -> None:
    encoder, _ = create(open_shards(small_shards))
    assert all(out.isfinite().all() for out in outputs(encoder.eval(), batch=1))


@pytest.mark.parametrize("learning_rate", [0.3, 3.0])
def test_ratings_are_learned_and_never_make_the_loss_infinite(small_shards: Path, learning_rate: float) -> None:
    """At the learning rate of configs/joint.yaml and ten times that; a squared error of the plain output was NaN."""
    shards, segment = open_shards(small_shards), torch.arange(8)
    song = shards.segments["song"].to_numpy()[:8]
    shards.songs.loc[song, "rating"] = [0.2 + 0.1 * (i % 8) for i in range(len(song))]
    ratings = torch.tensor(shards.songs["rating"].to_numpy("float32")[song])
    encoder, score = create(shards, "encoder.joint.tag_weight=0", "encoder.joint.rating_weight=1")
    optimizer = torch.optim.SGD(encoder.parameters(), lr=learning_rate, momentum=0.9)
    errors = []
    for _ in range(40):
        made = outputs(encoder)
        loss = score(made, segment).loss
        assert loss.isfinite()
        errors.append(rating_loss(made[4], ratings).item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if learning_rate < 1:
        assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize(("views_loss", "warns"), [("simsiam", True), ("contrastive", False)])
def test_it_warns_of_a_collapsed_projection_where_the_loss_allows_one(views_loss: str, warns: bool) -> None:
    config = load_config(assignments=["encoder.encoder_type=joint", f"encoder.joint.views_loss={views_loss}"])
    assert encoder_type(config).warn_of_collapse == warns


def test_it_learns_which_songs_are_by_one_artist(tmp_path: Path, small_shards: Path) -> None:
    over = {"encoder__epochs": 20, "encoder__batch_size": 10, "encoder__simsiam__learning_rate": 0.5}
    run_dir = train(tmp_path, small_shards, train__validate_every=100, **over, **JOINT)
    untrained, trained = (same_artist_is_nearer(run_dir, small_shards, trained) for trained in (False, True))
    assert trained > untrained + 0.1
