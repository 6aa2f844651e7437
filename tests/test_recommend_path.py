"""A path has even steps and repeats nothing; filters keep what fits, and what is not known does not fit."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.evaluation_tables import song_table
from test_recommend import chosen, library_file, numbers

from simsiam_dali.common.errors import UserError
from simsiam_dali.recommendation.path import song_path, taken_elsewhere, waypoints


def on_sphere(n: int, dims: int = 16, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, dims))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def steps(x: np.ndarray, rows: list[int]) -> np.ndarray:
    return np.linalg.norm(x[rows[1:]] - x[rows[:-1]], axis=1)


def nearest_to_the_straight_way(x: np.ndarray, start: int, end: int, count: int) -> list[int]:
    """The naive path: at each point of the great circle the nearest song that is not taken yet."""
    rows = [start]
    for point in waypoints(x[start], x[end], count - 2):
        rows.append(next(int(row) for row in np.argsort(-x @ point) if row not in (*rows, end)))
    return [*rows, end]


def test_waypoints_lie_evenly_on_the_great_circle() -> None:
    start, end = np.array([1.0, 0, 0]), np.array([0, 1.0, 0])
    angles = np.deg2rad([22.5, 45, 67.5])
    expected = np.column_stack([np.cos(angles), np.sin(angles), np.zeros(3)])
    np.testing.assert_allclose(waypoints(start, end, 3), expected, atol=1e-12)
    assert np.isfinite(waypoints(start, -start, 3)).all()
    np.testing.assert_allclose(waypoints(start, start, 2), [start, start])


@pytest.mark.parametrize("seed", range(4))
def test_its_steps_are_shorter_and_more_even_than_the_straight_way_s(seed: int) -> None:
    x = on_sphere(600, seed=seed)
    rows = song_path(x, (0, 1), 12, np.ones(600, bool), np.arange(600), [[f"artist {i}"] for i in range(600)])
    assert (rows[0], rows[-1], len(rows), len(set(rows))) == (0, 1, 12, 12)
    ours, naive = steps(x, rows), steps(x, nearest_to_the_straight_way(x, 0, 1, 12))
    assert ours.mean() < naive.mean()
    assert ours.max() < naive.max()


def test_no_artist_twice_in_a_row_and_no_recording_twice() -> None:
    x = on_sphere(300)
    artists, recording = [[f"artist {i % 4}"] for i in range(300)], np.arange(300) // 3
    rows = song_path(x, (0, 5), 20, np.ones(300, bool), recording, artists)
    assert all(artists[a] != artists[b] for a, b in itertools.pairwise(rows))
    assert len(set(recording[rows])) == 20


def test_of_places_that_want_one_song_the_farthest_loses_it_but_none_its_own() -> None:
    rows, nearness = [7, 3, 7, 7, 3], np.array([0.1, 0.9, 0.5, 0.3, 0.2])
    nobodys = np.zeros(5, bool)
    assert sorted(taken_elsewhere(rows, nobodys, nearness)) == [0, 4]
    assert sorted(taken_elsewhere(rows, np.array([True, False, False, False, True]), nearness)) == [1, 3]
    assert taken_elsewhere([1, 2, 3], nobodys[:3], nearness[:3]) == []


def test_a_path_through_songs_that_lie_together_has_each_once() -> None:
    x = on_sphere(100)[0] + 1e-3 * on_sphere(400)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    rows = song_path(x, (0, 1), 200, np.ones(400, bool), np.arange(400), [[f"artist {i}"] for i in range(400)])
    assert (rows[0], rows[-1], len(rows), len(set(rows))) == (0, 1, 200, 200)


def test_a_small_library_is_used_up_and_then_too_small() -> None:
    x, artists = on_sphere(10), [list[str]() for _ in range(10)]
    rows = song_path(x, (0, 1), 9, np.ones(10, bool), np.arange(10), artists)
    assert len(set(rows)) == 9
    with pytest.raises(UserError, match="a path of 11 songs needs 9 between its ends, and 8 are left"):
        song_path(x, (0, 1), 11, np.ones(10, bool), np.arange(10), artists)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """80 songs by 8 artists, at any place; years 1960 to 1999, two unknown; three genres; ratings 0 to 1."""
    table = song_table(80, artists=8)
    table["year"] = pd.array([1960 + i % 40 for i in range(78)] + [None] * 2, "Int64")
    library_file(tmp_path, table, on_sphere(80))
    return tmp_path


def test_the_command_walks_from_one_song_to_another(folder: Path) -> None:
    found = chosen(folder, "--path", "Title 3", "Title 40", "--count", 8)
    assert len(set(numbers(found))) == len(found) == 8
    assert (numbers(found)[0], numbers(found)[-1]) == (3, 40)
    assert all(a["artist"] != b["artist"] for a, b in itertools.pairwise(found))
    only = chosen(folder, "--path", "Title 3", "Title 40", "--count", 5, "--genre", "genre 1")
    assert {number % 8 % 3 for number in numbers(only)[1:-1]} == {1}  # its ends are the user's own choice


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--path", "Title 3", "Title 3"), "both are the same recording"),
        (("--path", "Title 3", "artist 1"), "--path takes one song, and artist 1 is a folder of 10"),
        (("--path", "Title 3", "Title 4", "--count", 2), "at least 3 songs"),
        (("--path", "Title 3", "Title 4", "--max-per-artist", 1), "varies artists itself"),
        (("--path", "Title 3", "Title 4", "--count", 90), "a path of 90 songs needs 88"),
    ],
)
def test_a_path_that_is_none(folder: Path, options: tuple[object, ...], told: str) -> None:
    with pytest.raises(UserError, match=told):
        chosen(folder, *options)


def test_filters_keep_what_fits(folder: Path) -> None:
    def found(*options: object) -> set[int]:
        return set(numbers(chosen(folder, "--like", "Title 0", "--count", 100, *options)))

    everything = set(range(1, 80))
    assert found() == everything
    assert found("--year", "1970-1972") == {i for i in everything if i < 78 and i % 40 in (10, 11, 12)}
    assert found("--year", 1999) == {39}
    assert found("--genre", "GENRE 2") == {i for i in everything if i % 8 % 3 == 2}
    ratings = song_table(80, artists=8)["rating"]
    assert found("--min-rating", 0.8) == {i for i in everything if ratings[i] >= 0.8}
    assert found("--min-rating", 0.8, "--genre", "genre 2", "--year", "1960-1979") == {
        i for i in everything if ratings[i] >= 0.8 and i % 8 % 3 == 2 and i < 78 and i % 40 < 20
    }
    with pytest.raises(UserError, match="none of the 80 songs is left"):
        found("--genre", "polka")
    with pytest.raises(UserError, match="--min-rating goes with --like, --path"):
        chosen(folder, "--top", "--min-rating", 0.5)


@pytest.mark.parametrize("text", ["1999-1990", "nineties", "1990-", "-1990", ""])
def test_a_year_that_is_none(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chosen(folder, "--like", "Title 0", f"--year={text}")
    assert "1990-" in capsys.readouterr().err
