"""The pretrained peer of the experiment on real music: what it is fed, how patches become a segment, refusals."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.running import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "real_music"))
import halves
import pretrained
from equal_time_scores import METRICS, STAGES

from simsiam_dali.common.errors import UserError
from simsiam_dali.embedding.table import Embeddings
from simsiam_dali.evaluation.within_song import WithinSong


def test_musicnn_is_fed_slaney_mels_of_power_compressed() -> None:
    seconds = torch.arange(16000) / 16000
    tone = torch.sin(2 * torch.pi * 1000 * seconds)[None]
    (frames,) = pretrained.log_mel()(tone)
    assert frames.shape == (63, 96)
    # Slaney's scale is linear below 1 kHz, 15 mels, and reaches 8 kHz at 45.2: the filter of 1 kHz is the 32nd of 96.
    assert {31, 32} >= set(frames[5:-5].argmax(dim=1).tolist())
    assert pretrained.log_mel()(torch.zeros(1, 16000)).abs().max() == 0


def test_a_segment_is_the_mean_over_its_patches_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a graph whose layers are the mean of a patch, and of its first and last frame; a cut patch is left out."""
    fed: list[int] = []

    class Session:
        def __init__(self, **_: object) -> None:
            pass

        def run(self, names: list[str], feed: dict[str, Any]) -> list[np.ndarray]:
            patches = feed["spectrogram"]
            fed.append(len(patches))
            assert feed["training"] is False
            assert names == ["two:0", "three:0"]
            return [patches.mean(axis=(1, 2))[:, None, None], patches[:, [0, -1], 0]]

    v1 = SimpleNamespace(Session=Session, ConfigProto=lambda **_: None)
    tf = SimpleNamespace(float32="float32", bool="bool", compat=SimpleNamespace(v1=v1))
    placeholders = [
        SimpleNamespace(type="Placeholder", outputs=[type("Input", (str,), {"dtype": kind})(name)])
        for name, kind in (("spectrogram", "float32"), ("training", "bool"))
    ]
    graph = SimpleNamespace(get_operations=lambda: placeholders)
    monkeypatch.setattr(pretrained, "tensorflow", lambda: tf)
    monkeypatch.setattr(pretrained, "frozen", lambda *_: graph)
    monkeypatch.setattr(pretrained, "PATCHES_AT_ONCE", 4)
    monkeypatch.setattr(pretrained, "LAYERS", {"one": ("two", 1), "another": ("three", 2)})
    wave = torch.randn(3, 16000 * 7, generator=torch.Generator().manual_seed(0))
    vectors = pretrained.musicnn()(wave)
    frames = pretrained.log_mel()(wave)[:, : 2 * pretrained.PATCH]  # 7 s are 438 frames: two patches
    one, two = frames.split(pretrained.PATCH, dim=1)
    expected = torch.stack(
        [frames.mean(dim=(1, 2)), (one[:, 0, 0] + two[:, 0, 0]) / 2, (one[:, -1, 0] + two[:, -1, 0]) / 2], 1
    )
    assert vectors.shape == (3, 3)
    assert torch.allclose(vectors, expected, atol=1e-5)
    assert fed == [4, 2]


@pytest.mark.parametrize("missing", ["tensorflow", "musicnn"])
def test_what_is_not_installed_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"pip install .*{missing}"):
        pretrained.tensorflow() if missing == "tensorflow" else pretrained.frozen(None, "MSD_musicnn", [])


def test_a_table_of_one_layer_is_what_it_would_be_without_the_others() -> None:
    rng = np.random.default_rng(0)
    song, size = np.repeat(np.arange(30), 4), sum(size for _, size in pretrained.LAYERS.values())
    segments = rng.standard_normal((len(song), size)).astype(np.float32)
    frame = pd.DataFrame({"path": [f"{n}.ogg" for n in range(30)]})

    def table(x: np.ndarray) -> Embeddings:
        means = np.stack([x[song == n].mean(axis=0) for n in range(30)])
        return Embeddings(frame, means, {}, WithinSong.of_segments(x, song))

    expected = table(segments[:, -250:-50]).unit()
    assert np.allclose(pretrained.of_layers(table(segments), ["penultimate"]).unit(), expected, atol=1e-4)
    both = pretrained.of_layers(table(segments), ["max", "tags"]).vectors
    assert both.shape == (30, 803)


def test_the_peer_stands_beside_the_recipe() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.random((3, 40)), rng.random((1, 40))
    soundtracks = {half: [f"{half}{n % 4}" for n in range(20)] for half in halves.HALVES}

    def row_of(scores: np.ndarray) -> dict[str, Any]:
        parts = [dict(zip(halves.HALVES, np.split(own, 2), strict=True)) for own in scores]
        return {
            str(seed): {half: dict.fromkeys(METRICS, own.tolist()) for half, own in part.items()}
            for seed, part in enumerate(parts)
        }

    recipe = {"scores": {STAGES: row_of(ours)}, "soundtracks": soundtracks}
    doc = {
        "scores": {"musicnn": row_of(theirs)},
        "soundtracks": soundtracks,
        "environment": {"cpu": "a CPU", "cores": 2, "date": "today", "commit": "abc"},
    }
    lines = list(pretrained.page_lines(doc, recipe))
    assert lines[2].startswith(f"| {STAGES} | {ours.mean():.3f} |  | ")
    assert lines[3].startswith(f"| musicnn | {theirs.mean():.3f} | {(ours - theirs).mean():+.3f} [")
    assert lines[-1] == "40 songs of 8 soundtracks; a CPU, 2 cores; today, commit abc."
    with pytest.raises(UserError, match="other songs"):
        list(pretrained.page_lines(doc | {"soundtracks": {"a": [], "b": []}}, recipe))
