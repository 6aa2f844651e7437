"""A walk through the library from one song to another, in even steps."""

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from simsiam_dali.common.errors import UserError
from simsiam_dali.evaluation.probes import label_matrix

CANDIDATES = 96
"""Songs considered for each place of a path: those nearest to where it would lie, and one that no other place needs."""

SAME_ARTIST = 1e3
"""Cost of two songs of an artist in a row, where a step costs at most 16: only taken where there is no other way."""


def waypoints(start: np.ndarray, end: np.ndarray, count: int) -> np.ndarray:
    """`count` unit vectors `(count, D)` on the great circle between two, evenly spaced, without the two."""
    angle = np.arccos(np.clip(start @ end, -1.0, 1.0))
    share = np.arange(1, count + 1)[:, None] / (count + 1)
    if np.sin(angle) < 1e-6:  # one place, or opposite ends of the sphere, between which no way is shorter
        points = (1 - share) * start + share * end
    else:
        points = (np.sin((1 - share) * angle) * start + np.sin(share * angle) * end) / np.sin(angle)
    return points / np.linalg.norm(points, axis=1, keepdims=True).clip(min=1e-9)


def song_path(
    x: np.ndarray,
    ends: tuple[int, int],
    count: int,
    allowed: np.ndarray,
    recording: np.ndarray,
    artists: Sequence[Sequence[str]],
) -> list[int]:
    """Rows of `count` songs, at least 3, from the first of `ends` to the second, both among them.

    Of all ways through each place's candidates, the one with the least sum of the steps' fourth powers, which a single
    long step would dominate. x: unit vectors `(N, D)`. allowed: BOOL `(N,)`, which songs may lie between. recording
    `(N,)`: of songs with one number only one is taken. artists: each song's. Raises UserError where too few are left.
    """
    start, end = ends
    between = count - 2
    free = np.flatnonzero(allowed & ~np.isin(recording, recording[[start, end]]))
    _, first = np.unique(recording[free], return_index=True)
    free = free[np.sort(first)]
    if len(free) < between:
        raise UserError(f"a path of {count} songs needs {between} between its ends, and {len(free)} are left: --count")
    # In the precision of x, and before the selection: else NumPy copies all of x, twice as wide.
    nearness = (waypoints(x[start], x[end], between).astype(x.dtype) @ x.T)[:, free]
    near = np.argpartition(-nearness, min(CANDIDATES, len(free)) - 1)[:, :CANDIDATES]
    candidates = list(free[near])
    own = free[linear_sum_assignment(-nearness)[1]]
    candidates = [np.union1d(songs, song) for songs, song in zip(candidates, own, strict=True)]
    column = {int(row): number for number, row in enumerate(free)}
    layers = [np.array([start]), *candidates, np.array([end])]
    costs = step_costs(x, layers, artists)
    taken_away = [np.zeros(len(layer)) for layer in layers]  # infinite where a song is another place's
    while True:
        rows = cheapest(layers, costs, taken_away)[1:-1]
        near_to = nearness[range(between), [column[row] for row in rows]]
        if not (lost := taken_elsewhere(rows, rows == own, near_to)):
            return [start, *rows, end]
        for place in lost:
            taken_away[place + 1][layers[place + 1] == rows[place]] = np.inf


def taken_elsewhere(rows: Sequence[int], is_own: np.ndarray, nearness: np.ndarray) -> list[int]:
    """Of the places that want one song, the farthest from it, for each song that several want.

    One at a time: the others may want another song when it has gone. No place loses its own song, though: so each has
    one left, whatever is taken away.
    """
    places: dict[int, list[int]] = {}
    for place in np.lexsort((nearness, is_own)).tolist():  # the farthest first, and a place's own song last
        places.setdefault(rows[place], []).append(place)
    return [wanting[0] for wanting in places.values() if len(wanting) > 1]


def step_costs(x: np.ndarray, layers: Sequence[np.ndarray], artists: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """The cost of each step from a song of one layer to one of the next: `(songs here, songs there)` of each pair."""
    names = {name: number for number, name in enumerate({name for own in artists for name in own})}
    used = np.unique(np.concatenate(layers))
    labels = label_matrix([[names[name] for name in artists[row]] for row in used])
    costs = []
    for before, after in itertools.pairwise(layers):
        squared = (2 - 2 * x[before] @ x[after].T).clip(min=0)
        here, there = (labels[np.searchsorted(used, layer)] for layer in (before, after))
        costs.append(squared**2 + SAME_ARTIST * ((here @ there.T).toarray() > 0))
    return costs


def cheapest(layers: Sequence[np.ndarray], costs: Sequence[np.ndarray], taken_away: Sequence[np.ndarray]) -> list[int]:
    """One song of each layer, with the least sum of costs, by dynamic programming."""
    total, came_from = taken_away[0], []
    for cost, own in zip(costs, taken_away[1:], strict=True):
        through = total[:, None] + cost
        came_from.append(through.argmin(axis=0))
        total = through.min(axis=0) + own
    chosen = int(total.argmin())
    rows = [int(layers[-1][chosen])]
    for layer, back in zip(reversed(layers[:-1]), reversed(came_from), strict=True):
        chosen = int(back[chosen])
        rows.append(int(layer[chosen]))
    return rows[::-1]
