"""The joint encoder: its loss is the weighted sum of its three, and unknown tags and ratings teach nothing."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.learned import same_artist_is_nearer
from helpers.running import command, losses, run, start, train, wait_for_step
from torch import Tensor

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import JointConfig
from simsiam_dali.data.shards import ShardSet, open_shards
from simsiam_dali.embedding import export
from simsiam_dali.embedding.run import read_run
from simsiam_dali.embedding.song_encoder import SongEncoder
from simsiam_dali.models.encoder import LossFn
from simsiam_dali.models.joint import TAG_DIM, TAG_HIDDEN, Joint
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


@pytest.mark.parametrize("read", ["backbone", "stages"])
def test_the_tags_read_the_pooled_map_or_the_statistics_of_the_stages(small_shards: Path, read: str) -> None:
    encoder, _ = create(open_shards(small_shards), f"encoder.joint.tags_read={read}")
    encoder.eval()
    views = [torch.randn(8, 128, 40, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    z, _, t, *_ = encoder(*views)
    h, stages = encoder.features(views[0]), encoder.backbone.stage_statistics(views[0][:, None])
    torch.testing.assert_close(z, encoder.projector(h))
    torch.testing.assert_close(t, encoder.tag_head(h if read == "backbone" else stages))
    t.square().sum().backward()
    # Of the norm that ends a block, whose weight is 0 at first: before it there is no gradient.
    last, first = (own[0].bn2.weight.grad for own in (encoder.backbone.layer4, encoder.backbone.layer1))
    assert first is not None
    assert first.any()
    assert (last is None) == (read == "stages")


@torch.no_grad()
@pytest.mark.parametrize("read", ["backbone", "stages"])
def test_an_embedding_of_stages_and_tags_is_both_side_by_side(small_shards: Path, read: str) -> None:
    sets = (f"encoder.joint.tags_read={read}", "encoder.simsiam.embedding=stages+tags")
    encoder, _ = create(open_shards(small_shards), *sets)
    encoder.eval()
    view = torch.randn(5, 128, 40, generator=torch.Generator().manual_seed(1))
    found = encoder.embed(view)
    assert found.shape == (5, encoder.embedding_dim)
    stages, tags = found[:, :-TAG_HIDDEN], found[:, -TAG_HIDDEN:]
    torch.testing.assert_close(stages, encoder.backbone.stage_statistics(view[:, None]))
    hidden = encoder.tag_head[:-1](stages if read == "stages" else encoder.features(view))
    torch.testing.assert_close(tags, F.normalize(hidden, dim=1))
    torch.testing.assert_close(encoder.tag_head[-1](hidden), encoder(view, view)[2])


def test_the_gradient_through_the_statistics_of_a_silent_view_is_finite(small_shards: Path) -> None:
    encoder, _ = create(open_shards(small_shards), "encoder.joint.tags_read=stages")
    view = torch.zeros(4, 128, 40)
    view[0] = torch.randn(128, 40, generator=torch.Generator().manual_seed(1))
    encoder(view, view)[2].square().sum().backward()
    gradient = next(encoder.backbone.parameters()).grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.any()


def test_other_encoder_types_have_no_output_of_tags() -> None:
    with pytest.raises(UserError, match=r"simsiam has no output stages\+tags, but backbone, projection, stages"):
        encoder_type(load_config(assignments=["encoder.simsiam.embedding=stages+tags"]))


def test_a_rating_is_read_from_the_direction_of_the_backbones_output_not_its_length(small_shards: Path) -> None:
    encoder, _ = create(open_shards(small_shards))
    h = torch.randn(8, encoder.backbone_dim, generator=torch.Generator().manual_seed(0))
    found = []
    for scale in (1, 1000):
        encoder.backbone.forward = lambda _, scale=scale: 5 + scale * h
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


def test_taught_at_the_stages_it_is_resumed_bit_for_bit_embeds_and_is_exported(
    tmp_path: Path, small_shards: Path
) -> None:
    over = {"encoder__joint__tags_read": "stages", "encoder__joint__use_folder": True, "encoder__epochs": 2, **JOINT}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "whole", small_shards, **over)
    args = command(tmp_path / "killed", small_shards, mlflow__enabled="false", train__checkpoint_every=1, **over)
    process = start(args, tmp_path / "killed")
    wait_for_step(process, tmp_path / "killed/runs", max(losses(whole)) // 2 + 1)
    process.kill()
    process.wait()
    (run_dir,) = (tmp_path / "killed/runs").iterdir()
    done = run([*args[:3], "--resume", str(run_dir)], tmp_path / "killed")
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(run_dir) == losses(whole)
    songs = SongEncoder(read_run(str(run_dir), embedding="stages+tags"))
    assert songs.embedding_dim == read_run(str(run_dir), embedding="stages").encoder().embedding_dim + TAG_HIDDEN
    export.to_onnx(songs)  # refused where onnxruntime gives other values
