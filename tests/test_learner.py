"""What a learner computes in, and where its labels come from: the GPU's side of it, without a GPU."""

import contextlib
import functools
import math
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from simsiam_dali.common.distributed import World
from simsiam_dali.config.load import load_config, replace_settings
from simsiam_dali.config.schema import Config
from simsiam_dali.data.loader import Batch
from simsiam_dali.models.encoder import LossOutput
from simsiam_dali.models.labels import SongLabels
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training.learner import Learner, autocast_dtype

GPU = torch.device("cuda", 0)
NO_SHARDS: Any = SimpleNamespace()


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)],  # T4 and RTX 20; A100; H100
)
def test_bf16_is_used_where_the_gpu_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: int, expected: torch.dtype
) -> None:
    """torch counts emulation unless told not to: here it works on every GPU."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=capability))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True, raising=False)
    assert torch.cuda.is_bf16_supported()
    assert autocast_dtype("auto", GPU) is expected
    assert autocast_dtype("bf16", GPU) is torch.bfloat16  # asked for, emulated or not
    assert autocast_dtype("auto", torch.device("cpu")) is torch.float32


class Rows(torch.Tensor):
    """Rows of segments that keep how they were moved, onto a GPU that is not there."""

    def pin_memory(self, *_: object) -> "Rows":
        moves.append("pinned")
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> torch.Tensor:  # type: ignore[override]
        moves.append((str(device), non_blocking))
        return self.as_subclass(torch.Tensor)


moves: list[object] = []


@pytest.mark.parametrize(("device", "expected"), [(GPU, ["pinned", ("cuda:0", True)]), ("cpu", [("cpu", True)])])
def test_the_host_does_not_wait_for_the_segments_of_a_batch(
    monkeypatch: pytest.MonkeyPatch, device: torch.device | str, expected: list[object]
) -> None:
    """A copy out of memory that is not pinned would stop the host until the GPU is done."""
    tags = {"artists": [["A"], ["B"]], "albums": [[], []], "album_artist": "", "year": [1990, 2020]}
    songs = pd.DataFrame(tags | {"path": ["a.flac", "b.flac"], "other_paths": [[], []]})
    shards: Any = SimpleNamespace(songs=songs, segments=pd.DataFrame({"song": [0, 0, 1, 1]}))
    monkeypatch.setattr(SongLabels, "to", lambda self, _: self)
    config = load_config(assignments=["encoder.encoder_type=simple"])
    score = encoder_type(config).create_loss_fn(shards, torch.device(device))
    moves.clear()
    scored = score(torch.randn(4, 8), torch.arange(4).as_subclass(Rows))
    assert scored.has_loss
    assert moves == expected


def test_a_run_in_bf16_continues_where_there_is_only_fp16() -> None:
    """Its checkpoint has no state for a gradient scaler, which starts anew."""
    config = load_config(assignments=["encoder.encoder_type=simple", "encoder.simple.base_channels=4"])
    tags = {"artists": [["A"]], "albums": [["B"]], "album_artist": "", "year": [1990]}
    songs = pd.DataFrame(tags | {"path": ["a.flac"], "other_paths": [[]]})
    shards: Any = SimpleNamespace(songs=songs, segments=pd.DataFrame({"song": [0]}))
    saved = Learner(config, shards, World(0, 1, torch.device("cpu"))).state_dict()
    assert saved["scaler"] == {}
    learner = Learner(config, shards, World(0, 1, torch.device("cpu")))
    learner.scaler = torch.amp.GradScaler("cpu")
    learner.load_state_dict(saved)
    assert learner.scaler.get_scale() == 65536


def small(kind: str = "simsiam", **over: object) -> Config:
    settings = (f"encoder_type={kind}", "batch_size=4", "simsiam.backbone=resnet18", "simsiam.backbone_width=8",
                "simsiam.projection_dim=16", "simsiam.predictor_hidden_dim=8")  # fmt: skip
    return replace_settings(load_config(assignments=[f"encoder.{setting}" for setting in settings]), **over)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_first_step_whose_gradients_overflow_changes_nothing_and_the_next_is_a_first_one(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fused SGD would otherwise leave its momentum as the memory was, and add it to the weights one step later."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, 1e9))  # memory that has been used
    monkeypatch.setattr("simsiam_dali.training.learner.autocast_dtype", lambda *_: torch.float16)
    config = small(encoder__simsiam__optimizer=optimizer)
    views = tuple(torch.randn(4, 32, 40, generator=torch.Generator().manual_seed(n)) for n in range(2))
    states = []
    for scales in ((math.inf, 1.0), (1.0,)):
        learner = Learner(config, NO_SHARDS, World(0, 1, torch.device("cpu")))
        learner.encoder.eval()  # no statistics of a batch: only the steps change anything
        monkeypatch.setattr(learner, "autocast", contextlib.nullcontext)
        for scale in scales:
            before = {name: p.clone() for name, p in learner.encoder.named_parameters()}
            learner.scaler._scale = torch.tensor(scale)
            learner.scaler._growth_tracker = torch.tensor(0, dtype=torch.int32)
            learner.step([Batch(views, torch.arange(4))], 0.1, 0.1)
            if scale > 1:
                assert all(torch.equal(p, before[name]) for name, p in learner.encoder.named_parameters())
        states.append(dict(learner.encoder.named_parameters()))
    overflowed, plain = states
    for name, value in plain.items():
        torch.testing.assert_close(overflowed[name], value, rtol=1e-5, atol=1e-6)


def test_a_loss_is_called_outside_autocast_with_what_the_encoder_returned_under_it() -> None:
    learner = Learner(small(train__precision="bf16"), NO_SHARDS, World(0, 1, torch.device("cpu")))
    batch = Batch(tuple(torch.randn(4, 32, 40) for _ in range(2)), torch.arange(4))
    score, seen = learner.loss_fn, []

    def noted(outputs: Any, segment: torch.Tensor) -> LossOutput:
        seen.append((torch.is_autocast_enabled("cpu"), {each.dtype for each in outputs}))
        return score(outputs, segment)

    learner.loss_fn = noted
    assert learner.step([batch], 0.1, 0.1).loss.dtype == torch.float32
    assert learner.validation_loss(batch).loss.dtype == torch.float32
    learner.trial_step(batch)
    assert len(seen) == 3
    assert {enabled for enabled, _ in seen} == {False}
    assert all(torch.bfloat16 in dtypes for _, dtypes in seen)


def test_a_compiled_encoder_may_recompute_its_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients, and running statistics that count each batch once."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    views = tuple(torch.randn(4, 32, 40, generator=torch.Generator().manual_seed(n)) for n in range(2))
    states = []
    for on in (False, True):
        config = small(train__compile=on, train__activation_checkpointing=on)
        learner = Learner(config, NO_SHARDS, World(0, 1, torch.device("cpu")))
        learner.encoder.train()
        for _ in range(2):
            learner.step([Batch(views, torch.arange(4))], 0.1, 0.1)
        states.append(learner.state_dict()["encoder"])
    plain, recomputed = states
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["simsiam", "byol"])
def test_a_compiled_encoder_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Traced as for a GPU, run without code generation, which would take a minute here."""
    config = small(kind)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    views = tuple(torch.randn(4, 32, 40, generator=torch.Generator().manual_seed(n)) for n in range(2))
    states = []
    for compiled in (False, True):
        world = World(0, 1, torch.device("cpu"))
        learner = Learner(replace_settings(config, train__compile=compiled), NO_SHARDS, world)
        learner.encoder.train()
        for _ in range(3):
            learner.step([Batch(views, torch.arange(4))], 0.1, 0.1)
        states.append(learner.state_dict()["encoder"])
    assert counter.frame_count > 0
    plain, traced = states
    assert plain.keys() == traced.keys()  # a checkpoint does not tell whether its encoder was compiled
    for name, value in plain.items():
        torch.testing.assert_close(traced[name], value, rtol=1e-4, atol=1e-5)
