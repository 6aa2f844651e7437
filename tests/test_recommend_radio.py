"""The radio starts near its song, drifts slowly and varies artists; --unlike takes away what is near to its songs."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from helpers.evaluation_tables import song_table
from test_recommend import chosen, library_file, numbers
from test_recommend_path import on_sphere, steps

from simsiam_dali.common.errors import UserError
from simsiam_dali.evaluation.knn import unit
from simsiam_dali.recommendation.radio import ARTIST_GAP, radio


def all_allowed(n: int) -> np.ndarray:
    return np.ones(n, bool)


def first(
    count: int, x: np.ndarray, start: int = 0, seed: int = 0, artists: list[list[str]] | None = None
) -> list[int]:
    n = len(x)
    return list(itertools.islice(radio(x, start, seed, all_allowed(n), np.arange(n), artists or [[]] * n), count))


@pytest.mark.parametrize("seed", range(3))
def test_it_stays_near_its_song_and_takes_small_steps(seed: int) -> None:
    x = on_sphere(2000, dims=4, seed=seed)
    rows = first(30, x, start=7, seed=seed)
    assert rows[0] == 7
    nearest = np.argsort(-(x @ x[7]))
    assert set(rows[:5]) <= set(nearest[:100])
    assert set(rows) <= set(nearest[:700])
    whole = np.random.default_rng(seed).permutation(2000)[:300]
    assert steps(x, rows).mean() < 0.5 * steps(x, list(whole)).mean()


def test_it_drifts_away_where_it_has_played_what_is_near() -> None:
    x = on_sphere(2000, dims=4)
    rows = first(1000, x)
    cosine = x[rows] @ x[0]
    assert cosine[:50].mean() > 0.8
    assert cosine[500:].mean() < 0.5
    assert steps(x, rows[:500]).mean() < 0.5  # two random songs lie sqrt(2) apart on average


def test_a_seed_gives_one_order_and_another_seed_another() -> None:
    x = on_sphere(500)
    assert first(50, x, seed=3) == first(50, x, seed=3)
    assert first(50, x, seed=3) != first(50, x, seed=4)


def test_no_artist_twice_within_a_few_songs_while_there_are_others() -> None:
    artists = [[f"artist {i % 12}", *(["guest"] if i % 5 == 0 else [])] for i in range(400)]
    rows = first(60, on_sphere(400), artists=artists)
    for place, row in enumerate(rows):
        before = {name for other in rows[max(0, place - ARTIST_GAP) : place] for name in artists[other]}
        assert before.isdisjoint(artists[row])


def test_few_artists_take_turns() -> None:
    artists = [[f"artist {i % 3}"] for i in range(30)]
    rows = first(30, on_sphere(30), artists=artists)
    assert sorted(rows) == list(range(30))
    assert all(len({row % 3 for row in rows[i : i + 3]}) == 3 for i in range(28))


def test_it_ends_when_each_allowed_recording_was_played_once() -> None:
    x, recording, allowed = on_sphere(60), np.arange(60) // 2, np.arange(60) < 50
    rows = list(radio(x, 55, 0, allowed, recording, [[]] * 60))  # its start is the user's own choice
    assert rows[0] == 55
    assert set(rows[1:]) <= set(range(50))
    assert sorted(recording[rows]) == [*range(25), 27]
    assert list(radio(x, 3, 0, np.zeros(60, bool), recording, [[]] * 60)) == [3]


def test_the_command_plays_a_seeded_radio(tmp_path: Path) -> None:
    library_file(tmp_path, song_table(80, artists=8), on_sphere(80))
    found = chosen(tmp_path, "--radio", "Title 11", "--count", 12, "--seed", 3)
    order = radio(unit(on_sphere(80)), 11, 3, all_allowed(80), np.arange(80), [[str(i % 8)] for i in range(80)])
    assert numbers(found) == list(itertools.islice(order, 12))
    assert numbers(chosen(tmp_path, "--radio", "Title 11", "--count", 12, "--seed", 4)) != numbers(found)
    only = chosen(tmp_path, "--radio", "Title 11", "--genre", "genre 1", "--count", 80)
    assert numbers(only)[0] == 11
    assert {i % 8 % 3 for i in numbers(only)[1:]} == {1}
    assert len(only) == 30 + (11 % 8 % 3 != 1)
    limited = chosen(tmp_path, "--radio", "Title 11", "--count", 80, "--max-per-artist", 2)
    assert len(limited) == 16


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--like", "Title 1", "--seed", 1), "--seed goes with --radio"),
        (("--radio", "artist 1"), "--radio takes one song, and artist 1 is a folder of 10"),
        (("--radio", "no such"), "--radio no such: no song of that name"),
        (("--top", "--unlike", "Title 1"), "--unlike goes with --like"),
        (("--like", "Title 1", "Title 2", "--unlike", "Title 2"), "Artist 2 - Title 2 is given with --like and with"),
        (("--like", "Title 1", "--unlike", "no such"), "--unlike no such: no song of that name"),
    ],
)
def test_requests_that_are_refused(tmp_path: Path, options: tuple[object, ...], told: str) -> None:
    library_file(tmp_path, song_table(80, artists=8), on_sphere(80))
    with pytest.raises(UserError, match=told):
        chosen(tmp_path, *options)


def at_angles(*degrees: float) -> np.ndarray:
    """Songs at these angles in a plane, and the same on the other side of 0: standardising does not turn them."""
    angle = np.deg2rad([*degrees, *(180 + d for d in degrees)])
    return np.column_stack([np.cos(angle), np.sin(angle)])


def test_unlike_takes_away_what_is_near_to_the_unliked_song(tmp_path: Path) -> None:
    """Songs on a circle: 0 is liked and 4, at 90 degrees, is not; each similarity is known from the angles."""
    degrees = [0, 30, -30, 60, 90, -60]
    x = at_angles(*degrees)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    angle = np.rad2deg(np.arctan2(x[:, 1], x[:, 0]))
    library_file(tmp_path, song_table(12, artists=12), x)
    like = np.cos(np.deg2rad(angle))
    unlike = np.cos(np.deg2rad(angle - angle[4]))
    found = chosen(tmp_path, "--like", "Title 0", "--unlike", "Title 4")
    assert set(numbers(found)) == set(range(12)) - {0, 4}
    expected = like - unlike.clip(min=0)
    np.testing.assert_allclose([float(row["similarity"]) for row in found], expected[numbers(found)], atol=1e-4)
    assert numbers(found)[:3] == [2, 5, 1]  # -30 and -60 degrees before 30, which is as near to 0 as -30 is
    assert numbers(chosen(tmp_path, "--like", "Title 0", "--count", 4)) == [1, 2, 3, 5]
