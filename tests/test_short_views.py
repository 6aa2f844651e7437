"""Short views beside the others: where they come from, what is drawn for them, and what their predictions aim at."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.graphs import FRAMES, LONG, OFF, SECONDS, SHORT, crops, graph, outputs, places, sweep
from helpers.signals import noise, write_shards
from torch import Tensor

from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import AugmentationConfig
from simsiam_dali.data.graph import Epoch, LogMel
from simsiam_dali.data.pipeline import PipelineSettings, build
from simsiam_dali.data.shards import ShardSet, open_shards
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training.data import create_loader, log_mel_settings, seconds_of_views

HALF = SHORT / 2
BRIEF = 1.2  # s

WITH_SHORT: dict[str, Any] = {"short_views": 2, "short_seconds": HALF}
SMALL = [
    "encoder.simsiam.backbone=resnet18",
    "encoder.simsiam.backbone_width=8",
    "encoder.simsiam.projection_dim=16",
    "encoder.simsiam.predictor_hidden_dim=8",
    "encoder.simsiam.augmentation.time_mask_param=5",
    "encoder.batch_size=4",
    "data.threads=1",
    "data.short_views=3",
    f"data.short_view_seconds={BRIEF}",
]


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    return write_shards(tmp_path_factory.mktemp("sweeps"), [sweep()] * 8)


@pytest.mark.parametrize("kind", ["same", "independent"])
def test_short_views_come_from_places_of_their_own_and_leave_the_others_as_they_are(
    kind: str, sweeps: Any, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = {"augmentation": AugmentationConfig(time_mask_param=10), "crops": kind}
    without = outputs(crops(sweeps, "views", **drawn), 8, batches=4)
    beside = outputs(crops(sweeps, "views", **drawn, **WITH_SHORT), 8, batches=4)
    for a, b in zip((without[0], without[1], without[-1]), (beside[0], beside[1], beside[-1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "AutoGraph" not in caplog.text  # DALI's warning of Python code that it cannot convert
    first, second, *short, _ = outputs(crops(sweeps, "views", crops=kind, **WITH_SHORT), 8, batches=8)
    assert [view.shape[2] for view in (first, *short)] == [LogMel().frames(each) for each in (SHORT, HALF, HALF)]
    middle = [places(view) for view in (first, second, *short)]
    for where in middle[2:]:
        assert where.min() < 0.15 * LONG
        assert where.max() > 0.85 * LONG
    for i, j in ((0, 2), (0, 3), (2, 3)):
        assert np.abs(middle[i] - middle[j]).mean() > 0.2 * LONG  # a third of the length, for two uniform places


def test_every_augmentation_is_drawn_for_each_and_time_masks_are_as_much_shorter(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [noise(SECONDS, seed) for seed in range(8)])
    cfg = OFF.model_copy(update={"time_mask_prob": 1.0, "time_mask_param": 40})
    one = graph(shards, "views", cfg, short_views=1, short_seconds=SECONDS / 4)
    long, _, short, _ = outputs(one, 8, batches=25)
    widest = [int((view == 0).all(axis=1).sum(axis=1).max()) for view in (long, short)]  # frames
    assert 30 < widest[0] <= 40
    assert 6 < widest[1] <= 10
    everything = graph(shards, "views", AugmentationConfig(time_mask_param=10), short_views=2, short_seconds=1.0)
    *_, a, b, _ = outputs(everything, 8)
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    assert not np.array_equal(a, b)


def test_a_batch_outside_the_epoch_has_a_placeholder_for_each(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [noise(SECONDS, seed) for seed in range(4)])
    one = graph(shards, "views", OFF, epoch=Epoch(used=1, reader_batches=2), **WITH_SHORT)
    pipeline = build(one, PipelineSettings(2, threads=1, prefetch=1, seed=0, gpu=None))
    frames = [[np.array(x.as_array()).shape[1] for x in pipeline.run()[:4]] for _ in range(3)]
    used = [FRAMES, FRAMES, LogMel().frames(HALF), LogMel().frames(HALF)]
    assert frames == [used, [1, 1, 1, 1], used]


def views_of(shards: ShardSet, *assignments: str) -> tuple[Any, tuple[Tensor, ...]]:
    """The config, and a batch of the training split."""
    config = load_config(assignments=[*SMALL, *assignments])
    world = World(0, 1, torch.device("cpu"))
    loader = create_loader(config, shards, log_mel_settings(config), world, "train", "views", shuffled=True)
    return config, next(iter(loader)).inputs


@pytest.mark.parametrize("own", ["simsiam", "byol", "contrastive", "joint"])
def test_every_encoder_on_views_takes_them(own: str, small_shards: Path) -> None:
    shards = open_shards(small_shards)
    config, views = views_of(shards, f"encoder.encoder_type={own}", "encoder.joint.views_loss=simsiam")
    kind = encoder_type(config)
    shapes = kind.input_shapes(log_mel_settings(config), shards.segment_seconds)
    assert [tuple(view.shape[1:]) for view in views] == shapes
    assert seconds_of_views(config, shards) == pytest.approx(2 * shards.segment_seconds + 3 * BRIEF)
    torch.manual_seed(0)
    encoder = kind.create(pretrained=False).train()
    scored = kind.create_loss_fn(shards, torch.device("cpu"))(encoder(*views), torch.arange(4))
    scored.loss.backward()
    learned = [p for group in encoder.param_groups() for p in group["params"]]
    wanted = {name: p for name, p in encoder.named_parameters() if not name.startswith("target.")}
    assert len(learned) == len(set(learned)) == len(wanted)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wanted.values())
    fixed = {id(p) for group in encoder.param_groups() if group["fix_lr"] for p in group["params"]}
    assert fixed == {id(p) for name, p in wanted.items() if "predictor." in name}
    assert any(name.startswith("short_predictor.") for name in wanted) == (own != "contrastive")


def test_short_views_are_predicted_by_a_predictor_of_their_own_and_are_no_target(small_shards: Path) -> None:
    config, views = views_of(open_shards(small_shards))
    torch.manual_seed(0)
    encoder = encoder_type(config).create(pretrained=False).train()
    *p, z1, z2 = encoder(*views)
    assert len(p) == len(views) == 5
    short: Any = encoder.short_predictor
    for parameter in short.parameters():
        parameter.data.zero_()
    *silent, _, _ = encoder(*views)
    assert all(each.any() for each in silent[:2])
    assert not any(each.any() for each in silent[2:])
    *_, other1, other2 = encoder(*views[:2], *(torch.randn_like(view) for view in views[2:]))
    torch.testing.assert_close((z1, z2), (other1, other2))


def test_short_views_longer_than_the_others_are_refused(small_shards: Path) -> None:
    with pytest.raises(UserError, match=r"short_view_seconds is 1\.2, but the other views have 1 s: use less"):
        views_of(open_shards(small_shards), "data.view_seconds=1")
