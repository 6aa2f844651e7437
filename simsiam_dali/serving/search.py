"""Nearest songs, paths, radio and songs to rate, by rows of the table.

Importing this takes seconds (scikit-learn), so the page is served without it, and it is made while the page is
already shown.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from threading import Lock

import numpy as np
import pandas as pd

from simsiam_dali.common.errors import UserError
from simsiam_dali.evaluation.knn import nearest
from simsiam_dali.recommendation.choose import Request, candidates, fit_ratings
from simsiam_dali.recommendation.library import Library, Variety
from simsiam_dali.recommendation.path import song_path
from simsiam_dali.recommendation.radio import radio
from simsiam_dali.recommendation.saved import chosen, read_saved, save

CLUSTERS = 10
"""As many as the map has colours."""


class Search:
    """What `recommend` finds by unit vectors `x (N, D)`. Rows are int; songs of one recording come once."""

    def __init__(self, library: Library, x: np.ndarray) -> None:
        self.library, self._x = library, x
        self._clusters: np.ndarray | None = None
        self._lock = Lock()

    def nearest(self, row: int, count: int) -> tuple[list[int], list[float]]:
        """Rows nearest to `row`, nearest first, and their cosines."""
        recording = self.library.recording
        # Other files of a recording take places among the nearest: twice as many are asked for.
        rows, cosine = nearest(self._x[[row]], self._x, 2 * count, (recording[[row]], recording))
        found = rows[0] >= 0
        rows, cosine = rows[0][found], cosine[0][found]
        first = np.sort(np.unique(recording[rows], return_index=True)[1])[:count]
        return rows[first].tolist(), cosine[first].round(4).tolist()

    def path(self, start: int, end: int, count: int) -> list[int]:
        """Rows of `count` songs from `start` to `end`. Raises UserError where there is no path."""
        recording = self.library.recording
        if recording[start] == recording[end]:
            raise UserError("a path goes from one song to another: both are the same recording")
        allowed = np.ones(len(self.library), bool)
        return song_path(self._x, (start, end), count, allowed, recording, self.library.artists)

    def radio(self, start: int, seed: int, without: Sequence[int], count: int) -> list[int]:
        """Up to `count` rows that follow `start`, none of the recordings `without`."""
        recording = self.library.recording
        allowed = ~np.isin(recording, recording[list(without)])
        songs = radio(self._x, start, seed, allowed, recording, self.library.artists)
        return list(islice(songs, 1, count + 1))

    def explore(self, ratings: np.ndarray, count: int) -> list[int]:
        """Unrated rows whose rating tells most, with `ratings (N,)` as they are now. Raises UserError below ten."""
        with self._lock:
            self._take(ratings)
            model, _ = fit_ratings(self.library, self._x)
            rows = candidates(self.library, [], Request(count=count))
        accept = Variety(self.library)
        return [int(rows[i]) for i in model.explore(self._x[rows], count, lambda i: accept(int(rows[i])))]

    def _take(self, ratings: np.ndarray) -> None:
        """Make ratings `(N,)` those of the library, of which they are a column: with the lock, as what reads them."""
        self.library.table["rating"] = pd.Series(ratings, index=self.library.table.index)

    def clusters(self) -> np.ndarray:
        """The cluster `(N,)` of each song, by k-means of the vectors; the largest is 0."""
        from sklearn.cluster import MiniBatchKMeans  # here: only this choice of colours needs it

        with self._lock:
            if self._clusters is None:
                model = MiniBatchKMeans(min(CLUSTERS, len(self._x)), random_state=0, n_init=3)
                labels = model.fit_predict(self._x)
                order = np.argsort(-np.bincount(labels), kind="stable")
                self._clusters = np.argsort(order)[labels]
            return self._clusters

    def playlist_names(self, folder: Path) -> list[str]:
        """Names of the saved playlists of a folder. Raises UserError where one is damaged."""
        return [saved.name for saved in read_saved(folder)]

    def playlist(self, folder: Path, name: str, ratings: np.ndarray) -> list[int] | None:
        """Rows of a saved playlist, as its request chooses them now, with `ratings (N,)`; None where there is none.

        Songs that the library no longer has are left out of a list of songs, which may become empty. Raises UserError
        where another request finds no song.
        """
        saved = next((saved for saved in read_saved(folder) if saved.name == name), None)
        if saved is None:
            return None
        if saved.request.songs:
            return [row for path in saved.request.songs for row in self.library.at(path)]
        with self._lock:
            self._take(ratings)
            return chosen(self.library, self._x, saved).rows

    def save_playlist(self, folder: Path, name: str, rows: Sequence[int], replace: bool) -> list[str]:
        """Save songs in this order; returns the names of the files. Raises UserError where that is refused."""
        songs = [str(self.library.music / self.library.path[row]) for row in rows]
        written = save(folder, name, Request(songs=songs), self.library, self._x, replace=replace)
        return [file.name for file in written.files]
