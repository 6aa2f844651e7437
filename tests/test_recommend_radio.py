"""The radio starts near its song, drifts slowly, varies artists, and plays each recording once."""

import itertools

import numpy as np
import pytest
from test_recommend_path import on_sphere, steps

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
