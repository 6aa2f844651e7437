"""How many songs an encoder learns from: draws that hold each other, as many steps, and a table beside the recipe."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.running import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "real_music"))
import halves
import training_songs
from equal_time_scores import METRICS, STAGES, UNTRAINED_STAGES

from simsiam_dali.common.errors import UserError

SONGS = [f"game {i % 7}/{i}.ogg" for i in range(100)]


def test_a_larger_draw_has_all_songs_of_a_smaller_one_and_each_seed_draws_others() -> None:
    small, large = (training_songs.drawn(SONGS, size, seed=0) for size in (10, 40))
    assert len(set(large)) == 40
    assert large[:10] == small
    assert training_songs.drawn(SONGS[::-1], 10, seed=0) == small  # whatever order they are listed in
    assert set(training_songs.drawn(SONGS, 10, seed=1)) != set(small)


def test_each_row_learns_from_its_songs_for_as_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: dict[Path, list[str]] = {}

    def pack_linked(songs: list[tuple[Path, str]], shards: halves.Shards, half: str, *_: object) -> None:
        packed[shards.learned(half)] = [song for _, song in songs]

    def open_shards(folder: Path) -> SimpleNamespace:
        songs = packed.get(folder, SONGS)
        segments = pd.DataFrame({"song": np.repeat(np.arange(len(songs)), 4)})
        return SimpleNamespace(songs=pd.DataFrame({"path": songs}), segments=segments)

    monkeypatch.setattr(halves, "pack_linked", pack_linked)
    monkeypatch.setattr(training_songs, "open_shards", open_shards)
    sets = halves.sets_of(tmp_path / "sets")
    library = training_songs.Library(sets, tmp_path / "made")
    few = library.learned("50 songs", 0)
    assert {training_songs.songs_of(few, half) for half in halves.HALVES} == {50}
    assert {library.epochs(few, half, 25) for half in halves.HALVES} == {50}
    own = library.learned(training_songs.SCORED, 0)
    assert {half: own.learned(half).resolve() for half in halves.HALVES} == dict(sets.asked)
    assert library.learned(training_songs.SCORED, 0) == own  # of a command that is run again


def test_the_rows_stand_beside_the_recipe_and_its_untrained_encoder() -> None:
    rng = np.random.default_rng(0)
    untrained, every, *others = rng.random((2 + len(training_songs.ROWS), 2, 40))

    def row_of(scores: np.ndarray) -> dict[str, dict[str, dict[str, list[float]]]]:
        parts = [dict(zip(halves.HALVES, np.split(own, 2), strict=True)) for own in scores]
        return {
            str(seed): {half: dict.fromkeys(METRICS, own.tolist()) for half, own in part.items()}
            for seed, part in enumerate(parts)
        }

    soundtracks = {half: [f"{half}{n % 4}" for n in range(20)] for half in halves.HALVES}
    recipe = {
        "scores": {STAGES: row_of(every)},
        "baselines": {UNTRAINED_STAGES: row_of(untrained)},
        "soundtracks": soundtracks,
    }
    doc: dict[str, Any] = {
        "all": {"a": 692, "b": 869},
        "songs": {row: dict.fromkeys(halves.HALVES, 50) for row in training_songs.ROWS},
        "scores": {row: row_of(own) for row, own in zip(training_songs.ROWS, others, strict=True)},
        "soundtracks": soundtracks,
        "environment": {"gpu": None, "cpu": "a CPU", "cores": 2, "date": "today", "commit": "abc"},
    }
    lines = list(training_songs.page_lines(doc, recipe))
    assert lines[2].startswith(f"| nothing (untrained) |  | 2 | {untrained.mean():.3f} |  | ")
    gap = (others[0] - untrained).mean()
    assert lines[3].startswith(f"| 50 songs | 50 | 2 | {others[0].mean():.3f} | {gap:+.3f} [")
    assert lines[5].startswith(f"| all other songs | 692 and 869 | 2 | {every.mean():.3f} | ")
    assert lines[6].startswith(f"| {training_songs.SCORED} | 50 | 2 | {others[-1].mean():.3f} | ")
    assert lines[8].startswith(f"- all other songs, minus 50 songs: 5-NN {(every - others[0]).mean():+.3f} [")
    assert lines[-1] == "40 songs of 8 soundtracks; a CPU, 2 cores; today, commit abc."
    del doc["scores"][training_songs.SCORED]  # not trained yet
    assert list(training_songs.page_lines(doc, recipe)) == [*lines[:6], *lines[7:9], *lines[10:]]
    with pytest.raises(UserError, match="other songs"):
        list(training_songs.page_lines(doc | {"soundtracks": {"a": [], "b": []}}, recipe))
