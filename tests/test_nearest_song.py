"""The sentence that ends a training: its figures against counts made by hand, and who is asked."""

import dataclasses
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.evaluation_tables import planted, song_table
from helpers.running import command, run
from scipy.stats import binom

from simsiam_dali.common.distributed import World
from simsiam_dali.data.shards import ShardSet, open_shards
from simsiam_dali.embedding import closing_score as outcome
from simsiam_dali.embedding import features
from simsiam_dali.embedding.run import read_run
from simsiam_dali.evaluation import nearest_song
from simsiam_dali.evaluation.knn import unit
from simsiam_dali.evaluation.within_song import WithinSong
from simsiam_dali.training import checkpoint

HERE = World(0, 1, torch.device("cpu"))


def table(artists: list[list[str]], **columns: list) -> pd.DataFrame:
    """Songs by these artists, all recordings of their own."""
    n = len(artists)
    made = {
        "title": [f"Song {i}" for i in range(n)],
        "path": [f"{i}.flac" for i in range(n)],
        "artists": artists,
        "albums": [[]] * n,
        "album_artist": [""] * n,
        "genres": [[]] * n,
        "duration": [100.0 + 10 * i for i in range(n)],
        "split": ["train"] * n,
    }
    return pd.DataFrame(made | columns)


# Twelve points on a circle, at these degrees: standardising such a circle leaves its angles as they are.
HOURS = np.arange(12) * 30


def at(*degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def shares(x: np.ndarray, labels: list[list[int]], group: np.ndarray) -> np.ndarray:
    return nearest_song.nearest_shares(unit(x), labels, group)


def sentence_of(songs: pd.DataFrame, vectors: dict[str, np.ndarray], held_back_only: bool) -> str:
    return nearest_song.sentence(songs, {name: unit(x) for name, x in vectors.items()}, held_back_only)


def test_a_hit_is_counted_where_the_nearest_is_by_an_artist_of_the_song() -> None:
    """Four songs at the corners of a square, moved in pairs: who is near whom can be said by hand."""
    x = at(0, 10, 180, 190)
    assert shares(x, [[0], [0], [1], [1]], np.arange(4)).tolist() == [1, 1, 1, 1]
    assert shares(x, [[0], [1], [0], [1]], np.arange(4)).tolist() == [0, 0, 0, 0]
    # Only one of the two artists has to be shared; the third song's only artist has no other song.
    assert shares(x, [[0, 2], [0], [1], [2]], np.arange(4))[[0, 1, 3]].tolist() == [1, 1, 0]
    assert np.isnan(shares(x, [[0, 2], [0], [1], [2]], np.arange(4))[2])


def test_another_file_of_one_recording_is_no_neighbour() -> None:
    x = at(0, 10, 180, 190)
    hit = shares(x, [[0], [0], [0], [0]], np.array([0, 0, 1, 2]))
    assert hit.tolist() == [1, 1, 1, 1]  # the first two have the far ones
    hit = shares(x, [[0], [0], [1], [1]], np.array([0, 0, 1, 2]))
    assert np.isnan(hit[:2]).all()
    assert hit[2:].tolist() == [1, 1]


def test_a_tie_is_no_hit() -> None:
    """On a circle each song lies between its partner and a stranger, equally far from both."""
    x, pairs = at(*HOURS), [[i // 2] for i in range(12)]
    assert shares(x, pairs, np.arange(12)).sum() == 0
    assert shares(np.ones((12, 5)), pairs, np.arange(12)).sum() == 0  # a collapsed encoder
    same = np.repeat(at(0, 90, 180, 270), 3, axis=0)
    assert shares(same, [[i // 3] for i in range(12)], np.arange(12)).sum() == 12  # all three are by the artist
    mixed = [[i // 3] if i % 3 else [4] for i in range(12)]
    assert shares(same, mixed, np.arange(12)).sum() == 0  # at every place a stranger is as near


def test_the_sentence_says_the_counts() -> None:
    """Twelve songs: two by nobody known, one by somebody with no other; nine are asked."""
    artists = [["A"], ["a "], ["A", "B"], ["B"], ["C"], ["C"], ["C"], ["D"], ["D"], ["E"], [], ["Various Artists"]]
    songs = table(artists)
    # Three heaps, as corners of a triangle: A, a, A+B; then B, C, C, C, D with the Cs closest together; then D, E.
    heap = np.eye(3)[[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 0, 0]]
    good = np.c_[heap, [0, 1, 2, -20, 0, 1, 2, 20, 0, 0, 0, 0]]
    none = at(*(HOURS[i * 5 % 12] for i in range(12)))
    said = sentence_of(
        songs, {"embedding": good, "untrained": none, "mfcc": good, "log-mel": none}, held_back_only=False
    )
    labels = [[0], [0], [0, 1], [1], [2], [2], [2], [3], [3], [4]]
    ours, theirs = (shares(x[:10], labels, np.arange(10)) for x in (good, none))
    assert np.nansum(ours) == 6
    assert np.isnan(ours).tolist() == [False] * 9 + [True]
    assert said.startswith("the nearest song is by the same artist for 6 of 9 songs; ")
    assert f"{np.nansum(theirs):.0f} with the untrained encoder (+{6 - np.nansum(theirs):.0f}, too few artists" in said
    assert said.endswith("6 with MFCCs (+0, too few artists for an interval)")


def test_the_interval_is_of_the_paired_differences_of_whole_artists() -> None:
    """50 artists of two songs: the baseline finds neither song of 20, so that a draw has twice a binomial, p 0.4."""
    artist = np.repeat(np.arange(50), 2)
    songs = table([[f"Artist {a}"] for a in artist])
    x = planted(artist, width=64, noise=0.01)
    worse = x.copy()
    worse[1:21:2], worse[21:41:2] = x[21:41:2], x[1:21:2]  # ten pairs of artists swap a song: all 40 lose their partner
    said = sentence_of(songs, {"embedding": x, "untrained": worse}, held_back_only=False)
    found = re.search(r"\(\+40, 95% interval \+(\d+) to \+(\d+)\)", said)
    assert found
    low, high = map(int, found.groups())
    assert (low, high) == pytest.approx(tuple(2 * binom.ppf([0.025, 0.975], 50, 0.4)), abs=2)
    assert "for 100 of 100 songs; 60 with the untrained encoder" in said


def test_an_encoder_that_learned_from_tags_is_scored_on_other_songs_only() -> None:
    songs = song_table(30)
    x = planted(np.arange(30) % 6)
    everyone = sentence_of(songs, {"embedding": x}, held_back_only=False)
    assert everyone == "the nearest song is by the same artist for 30 of 30 songs"
    held_back = sentence_of(songs, {"embedding": x}, held_back_only=True)
    assert held_back == "the nearest song is by the same artist for 10 of 10 songs held back from the training"
    songs["split"] = "train"
    assert sentence_of(songs, {"embedding": x}, held_back_only=True) == ""


def test_without_two_songs_of_one_artist_the_genre_is_used_and_without_labels_nothing_is_printed() -> None:
    x = at(0, 5, 180, 185)
    songs = table([["A"], ["B"], ["C"], []], genres=[["Rock"], ["rock"], ["Jazz"], ["Jazz"]])
    said = sentence_of(songs, {"embedding": x}, held_back_only=False)
    assert said == "the nearest song is of the same genre for 4 of 4 songs"
    assert sentence_of(table([["A"], ["B"], [], []]), {"embedding": x}, held_back_only=False) == ""
    same = table([["A"], ["A"], [], []], title=["One", "One", "Two", "Three"], duration=[100.0, 100.5, 90.0, 80.0])
    assert sentence_of(same, {"embedding": x}, held_back_only=False) == ""  # two files of one recording


@pytest.mark.parametrize("kind", ["simsiam", "simple"])
def test_a_training_ends_with_the_sentence_and_evaluate_prints_the_same(
    kind: str, small_shards: Path, tmp_path: Path
) -> None:
    tiny: dict[str, object] = {"encoder__embedding_dim": 24, "encoder__simple__base_channels": 4, "encoder__epochs": 1}
    tiny["train__closing_score"] = "true"
    done = run(command(tmp_path, small_shards, encoder__encoder_type=kind, mlflow__enabled="false", **tiny), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    whose = "16 songs" if kind == "simsiam" else r"\d+ songs held back from the training"
    assert re.fullmatch(
        rf"the nearest song is by the same artist for \d+ of {whose}; \d+ with the untrained encoder \(.*\), \d+ with"
        r" MFCCs \(.*\)",
        last,
    )
    (run_dir,) = (tmp_path / "runs").iterdir()
    python = command(tmp_path, small_shards)[0]
    embedded = run([python, "-m", "simsiam_dali.embed", "--checkpoint", str(run_dir), "--baselines"], tmp_path)
    assert embedded.returncode == 0, embedded.stderr[-2000:]
    evaluated = run([python, "-m", "simsiam_dali.evaluate", "--no-maps", "--no-mlflow"], tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    assert last in evaluated.stdout


def test_of_a_large_set_whole_artists_are_drawn(
    small_runs: dict[str, Path], small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part holds all songs of its artists, with the vectors that they have in the whole set."""
    shards = open_shards(small_shards)
    half = len(shards.segments) // 2
    with outcome.sample_songs(shards, half, seed=0) as part:
        read = {split: part.count(split) for split in ("train", "val")}
        assert 0 < sum(read.values()) <= half
        songs, vectors = embedded(small_runs["simsiam"], part)
    every_song, everything = embedded(small_runs["simsiam"], shards)
    artists = shards.songs["artists"].str[0]
    assert set(songs) == set(np.flatnonzero(artists.isin(artists.iloc[songs].unique())))
    rows = np.searchsorted(every_song, songs)
    for name, (x, _) in vectors.items():
        assert np.allclose(x, everything[name][0][rows], rtol=1e-4, atol=1e-5), name
    moved = tmp_path / "moved"
    shutil.copytree(small_shards, moved)
    run_dir = small_runs["simsiam"]
    assert outcome.closing_score(run_dir, HERE, moved).count(f"of {len(every_song)} songs;") == 1
    monkeypatch.setattr(outcome, "MAX_SEGMENTS", half)
    said = outcome.closing_score(run_dir, HERE, small_shards)
    assert f"of {len(songs)} songs, drawn from {len(every_song)};" in said


def drawn(monkeypatch: pytest.MonkeyPatch, artists: list[int], segments: int, most: int, seed: int) -> list[int]:
    """The artist of each segment in a sample of songs by `artists`, which have `segments` segments each."""
    monkeypatch.setattr(outcome, "subset_of", lambda shards, rows, _: dataclasses.replace(shards, rows=rows))
    song = np.repeat(np.arange(len(artists)), segments)
    songs = table([[f"Artist {artist}"] for artist in artists])
    manifest: Any = None  # a sample is drawn from the tables alone
    with outcome.sample_songs(ShardSet(Path(), manifest, songs, pd.DataFrame({"song": song})), most, seed) as part:
        return np.array(artists)[song[part.rows]].tolist()


def test_an_artist_that_does_not_fit_into_the_sample_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten artists of two songs, one of eight: with it or without it, 20 songs can be drawn."""
    artists = [*np.repeat(np.arange(10), 2), *[10] * 8]
    samples = [drawn(monkeypatch, artists, segments=1, most=20, seed=seed) for seed in range(10)]
    assert {len(sample) for sample in samples} == {20}
    assert {sample.count(10) for sample in samples} == {0, 8}


@pytest.mark.parametrize("seed", range(5))
def test_of_one_huge_artist_as_many_songs_are_drawn_as_fill_half_the_sample(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    artists = [*np.repeat(np.arange(1, 3), 2), *[0] * 20]
    sample = drawn(monkeypatch, artists, segments=3, most=24, seed=seed)
    assert {artist: sample.count(artist) for artist in range(3)} == {0: 12, 1: 6, 2: 6}


def test_where_no_song_fits_into_the_sample_nothing_is_printed(
    small_runs: dict[str, Path], small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "MAX_SEGMENTS", 0)
    assert outcome.closing_score(small_runs["simsiam"], HERE, small_shards) == ""


def embedded(
    run_dir: Path, shards: outcome.ShardSet
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, WithinSong | None]]]:
    """What `closing_score` embeds, for a run on the small shards."""
    of_run = read_run(str(run_dir))
    config = outcome.embedding_config(of_run.config, shards.segment_seconds)
    log_mel = outcome.with_statistics(outcome.log_mel_settings(config), **of_run.statistics)
    names = (features.CHECKPOINT, *nearest_song.BASELINES)
    made = [features.create_features(name, of_run, log_mel, HERE.device) for name in names]
    return outcome.embed_songs(made, outcome.CleanViews(config, shards, log_mel, HERE))


INTERRUPTED = "signal.raise_signal(signal.SIGINT)"
OUT_OF_MEMORY = "exec('raise RuntimeError(\"cuDNN error: CUDNN_STATUS_ALLOC_FAILED\")')"


@pytest.mark.parametrize(("event", "status"), [(INTERRUPTED, 130), (OUT_OF_MEMORY, 1)])
def test_a_closing_score_that_is_interrupted_or_fails_leaves_a_complete_run(
    small_runs: dict[str, Path], tmp_path: Path, event: str, status: int
) -> None:
    """After the last epoch: one line, and the checkpoint and its journal stay."""
    run_dir = shutil.copytree(small_runs["simsiam"], tmp_path / "runs/done")
    script = f"""
import signal
from simsiam_dali import train
from simsiam_dali.embedding import closing_score
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
closing_score.closing_score = lambda *_: {event}
train.main()
"""
    options = ("--resume", str(run_dir), "--set", "train.closing_score=true")
    done = run([sys.executable, "-c", script, *options], tmp_path)
    assert done.returncode == status, done.stderr[-2000:]
    if event == INTERRUPTED:
        assert f"stopped before the closing score; the training in {run_dir} is complete" in done.stdout
    else:
        assert f"error: the training in {run_dir} is complete, but not its closing score: cuDNN error" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint.is_intact(run_dir / checkpoint.FILE_NAME)
