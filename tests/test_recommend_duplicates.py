"""The same recording is found in another codec, level or trim; other songs are not, however near their vectors are."""

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.evaluation_tables import song_table
from helpers.small_music import write_audio
from test_recommend import command, library_file

from simsiam_dali.common.errors import UserError
from simsiam_dali.evaluation.knn import l2_normalised
from simsiam_dali.recommendation import duplicates
from simsiam_dali.recommendation.duplicates import candidate_pairs
from simsiam_dali.recommendation.fingerprint import MAX_LAG, MIN_OVERLAP, RATE, compare, of_samples


def music(seed: int, seconds: float, rate: int = RATE) -> np.ndarray:
    """Chords of random notes, four a second, in a little noise: float32 `(samples,)`."""
    rng = np.random.default_rng(seed)
    time = np.arange(rate // 4) / rate
    decay = np.exp(-4 * time)
    notes = [
        decay * sum(np.sin(2 * np.pi * frequency * time) for frequency in rng.uniform(200, 1800, 4))
        for _ in range(round(seconds * 4))
    ]
    pcm = np.concatenate(notes) * 0.1
    return (pcm + 0.001 * rng.standard_normal(len(pcm))).astype(np.float32)


SONG = music(0, 40)
NOISE = np.random.default_rng(1).standard_normal(len(SONG)).astype(np.float32)


@pytest.mark.parametrize(
    ("other", "lag"),
    [
        (0.05 * SONG, 0.0),
        (0.5 * SONG[2 * RATE :], 2.0),
        (np.r_[np.zeros(5 * RATE, np.float32), SONG], -5.0),
        (np.r_[SONG, np.zeros(20 * RATE, np.float32)], 0.0),
        (SONG[: -3 * RATE] + 0.01 * NOISE[: -3 * RATE], 0.0),
        (SONG + 0.3 * np.r_[np.zeros(RATE // 20, np.float32), SONG[: -RATE // 20]], 0.0),
    ],
    ids=["quieter", "without its start", "later", "with silence after it", "noisy, without its end", "with an echo"],
)
def test_a_copy_is_the_same_recording(other: np.ndarray, lag: float) -> None:
    match = compare(of_samples(SONG), of_samples(other))
    assert match.is_same_recording
    assert match.lag == pytest.approx(lag, abs=0.05)
    back = compare(of_samples(other), of_samples(SONG))
    assert back.is_same_recording
    assert back.lag == pytest.approx(-lag, abs=0.05)


@pytest.mark.parametrize(
    "other",
    [
        music(1, 40),
        np.r_[SONG[: 20 * RATE], music(1, 20)],
        np.r_[SONG[: 30 * RATE], music(1, 10)],
        SONG[: 25 * RATE],
        np.r_[SONG, SONG],
        SONG[8 * RATE :],
        np.zeros(40 * RATE, np.float32),
        SONG[:100],
        np.empty(0, np.float32),
    ],
    ids=["other", "half", "three quarters", "short", "looped", "late", "silence", "too short", "empty"],
)
def test_other_audio_is_not(other: np.ndarray) -> None:
    assert not compare(of_samples(SONG), of_samples(other)).is_same_recording
    assert not compare(of_samples(other), of_samples(SONG)).is_same_recording
    assert not compare(of_samples(other), of_samples(music(2, 10))).is_same_recording


def test_candidates_are_all_near_pairs_of_like_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_BLOCK", 16)  # more than one block
    monkeypatch.setattr(duplicates, "NEAREST", 3)
    rng = np.random.default_rng(0)
    x, seconds = l2_normalised(rng.standard_normal((100, 4))), rng.uniform(20, 120, 100)
    seconds[3] = np.nan
    rows = np.flatnonzero(rng.random(100) < 0.8)
    shorter, longer = np.minimum.outer(seconds, seconds), np.maximum.outer(seconds, seconds)
    fits = (longer <= shorter + 2 * MAX_LAG) & (longer <= shorter / MIN_OVERLAP) & ~np.eye(100, dtype=bool)
    fits &= np.isin(np.arange(100), rows) & np.isin(np.arange(100), rows)[:, None]
    cosine = np.where(fits, x @ x.T, -1)
    nearest = np.argsort(np.argsort(-cosine, axis=1), axis=1) < 3
    near = (nearest | nearest.T) & (cosine >= duplicates.MIN_COSINE)
    expected = [[a, b] for a in rows for b in rows if a < b and near[a, b]]
    assert len(expected) > 20
    assert candidate_pairs(x, seconds, rows).tolist() == expected


@pytest.fixture
def copies(tmp_path: Path) -> tuple[Path, pd.DataFrame]:
    """Twelve songs: 0 to 3 are files of one recording, 4 and 5 of another; all vectors of 0 to 9 are nearly equal."""
    rate = 22050
    one, two = music(0, 20, rate)[:, None], music(1, 20, rate)[:, None]
    audio = {
        "a.mp3": one, "a.flac": one, "a trimmed.wav": 0.5 * one[2 * rate :], "a.ogg": one,
        "b.ogg": two, "b.wav": two, "shared.wav": np.concatenate([one[: 10 * rate], two[: 10 * rate]]),
        "missing.wav": None, "damaged.mp3": None,
    }  # fmt: skip
    names = [*audio, *(f"{i}.wav" for i in range(9, 12))]
    table = song_table(12).assign(path=names, duration=20.0, year=pd.array([2000] * 4 + [1990] * 8, "Int64"))
    table.loc[2, "duration"] = 18.0
    vectors = np.random.default_rng(0).standard_normal((12, 16)) * np.where(np.arange(12) < 9, 0.01, 1)[:, None]
    library_file(tmp_path, table, vectors + np.where(np.arange(12) < 9, 5, 0)[:, None], files=False)
    for name, pcm in audio.items():
        if pcm is not None:
            write_audio(tmp_path / "music" / name, pcm, rate)
    (tmp_path / "music/damaged.mp3").write_bytes(b"no audio" * 99)
    return tmp_path, table


def listed(folder: Path, *options: object) -> list[list[str]]:
    """The groups that the command writes, each the names of its files."""
    command("--embeddings", folder / "embeddings.parquet", "--duplicates", "--csv", folder / "out.csv", *options)
    with (folder / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(Path(row["path"]).name)
        assert row["copy"] == str(len(groups[row["group"]]))
    return list(groups.values())


def test_the_command_lists_copies_best_first_and_changes_nothing(
    copies: tuple[Path, pd.DataFrame], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = copies
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (folder / "music").iterdir()}
    groups = listed(folder)
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (folder / "music").iterdir()} == before
    assert len(groups) == 2
    first, second = groups
    assert set(first[:2]) == {"a.flac", "a trimmed.wav"}  # lossless before lossy
    assert set(first[2:]) == {"a.mp3", "a.ogg"}
    assert second == ["b.wav", "b.ogg"]
    shown = capsys.readouterr()
    assert "2 recordings are there more than once, in 6 of 12 files" in shown.out
    for name in ("missing.wav", "damaged.mp3"):
        assert f": {name}" in shown.err
    assert listed(folder, "--year", 1990) == [["b.wav", "b.ogg"]]  # its own table is written over


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--count", 5], "--count does not go with --duplicates"),
        (["--max-per-artist", 1], "--max-per-artist does not go with"),
        (["--m3u8", "x.m3u8"], "--m3u8 does not go with"),
        (["--save", "x"], "--save does not go with"),
    ],
)
def test_options_that_do_not_go_with_it(copies: tuple[Path, pd.DataFrame], options: list[object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        listed(copies[0], *options)
