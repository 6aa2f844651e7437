"""Splits for cross-validation: groups of songs that stay together, and folds made of whole groups."""

import math
import warnings
from collections.abc import Hashable, Iterable
from pathlib import PurePath

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from simsiam_dali.common.names import album_keys, artist_keys, name_key

SPLITS = ("song", "album")
FOLDS = 5
SAME_SECONDS = 2.0
"""Songs of one title and artist count as one recording when their lengths differ by less than this."""

Folds = list[tuple[np.ndarray, np.ndarray]]
"""Pairs (train, test) of row numbers; each row is in one test part."""


def groups(table: pd.DataFrame, split: str) -> np.ndarray:
    """`(N,)` int64: songs with the same number are never on two sides of `split`, which is `song` or `album`.

    By song, two files of one recording are one group (packing merges equal audio, but not two rips). By album, all
    songs of an album are, and albums that share a song are one. An album is identified by its title and its artist;
    without an album artist also by its folder, since a compilation's songs have an artist each. A song on no album is
    alone.
    """
    keys = [recording_keys(*row) for row in zip(table["title"], table["artists"], table["duration"], strict=True)]
    if split == "album":
        songs = zip(table["albums"], table["album_artist"], table["artists"], table["path"], strict=True)
        for own, (albums, album_artist, artists, path) in zip(keys, songs, strict=True):
            own += [("album", *key) for key in album_keys(albums, album_artist, artists)]
            if not album_artist:
                own += [("folder", str(PurePath(path).parent), name_key(album)) for album in albums]
    # Songs that share a key, directly or through other songs, are connected.
    number: dict[Hashable, int] = {}
    rows = [row for row, own in enumerate(keys) for _ in own]
    columns = [len(keys) + number.setdefault(key, len(number)) for own in keys for key in own]
    nodes = len(keys) + len(number)
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1][: len(keys)].astype("int64")


def recording_keys(title: str, artists: Iterable[str], duration: float) -> list[Hashable]:
    """Keys that two files of one recording share; none for a song without title, artist or length."""
    first = next(iter(artist_keys(artists)), None)
    if not title or first is None or not math.isfinite(duration):
        return []
    # Two grids, half a cell apart: lengths that differ little share a cell of one of them.
    cells = (int((duration + shift) // (2 * SAME_SECONDS)) for shift in (0.0, SAME_SECONDS))
    return [("recording", name_key(title), first, grid, cell) for grid, cell in enumerate(cells)]


def folds(group: np.ndarray, classes: np.ndarray | None = None, n: int = FOLDS) -> Folds:
    """At most `n` folds of whole groups `(N,)`; with `classes (N,)` int, each class is spread over them.

    Fewer where there are fewer groups, or no class has that many songs. No folds at all for fewer than two groups.
    """
    n = min(n, len(np.unique(group)))
    if classes is not None:
        n = min(n, int(np.bincount(classes).max(initial=0)))
    if n < 2:
        return []
    rows = np.zeros((len(group), 1))
    if classes is None:
        # Shuffled: groups of equal size would otherwise be dealt out in the order of the library.
        order = np.random.default_rng(0).permutation(group.max() + 1)
        made = GroupKFold(n).split(rows, groups=order[group])
    else:
        made = StratifiedGroupKFold(n).split(rows, classes, group)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        parts = [(train, test) for train, test in made if len(train) and len(test)]
    for train, test in parts:
        assert not np.intersect1d(group[train], group[test]).size, "a group is on both sides of a split"
    return parts
