"""The songs that are served: what the page shows of each, and, once it is made, the search."""

import json
import math
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from simsiam_dali.embedding.table import Embeddings
from simsiam_dali.evaluation.map_colours import OTHER, PALETTE, categories, kinds, most_coloured
from simsiam_dali.packing.find import file_of
from simsiam_dali.serving.positions import Positions
from simsiam_dali.serving.ratings import Ratings

if TYPE_CHECKING:
    from simsiam_dali.serving.search import Search


class ServedLibrary:
    """An embedding table, its music folder and its ratings file. Raises UserError for ratings it cannot read."""

    def __init__(self, table: Path, songs: Embeddings, music: Path, ratings: Path) -> None:
        self.table, self.music = songs.table, music
        self._file, self._songs = table, songs
        self.ratings = Ratings(ratings, songs.table, music)
        # A thread for each request, none of which computes long: more threads would only slow the others down.
        threadpool_limits(1, user_api="blas")
        # NumPy computes them while Python looks for the files and makes the page.
        self._positions = ThreadPoolExecutor(1).submit(Positions, table, songs.vectors)
        self._search: Future[Search] | None = None
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        return len(self.table)

    @property
    def positions(self) -> Positions:
        """Where the songs lie on the map."""
        return self._positions.result()

    def files_found(self) -> int:
        """How many of the songs' files are there."""
        music = str(self.music)
        # Bytes of a name that are not UTF-8 are escaped: only such names take the longer way.
        return sum(
            os.path.exists(f"{music}/{name}") or ("\\x" in name and file_of(name, self.music).exists())  # noqa: PTH110 - 100,000
            for name in self.table["path"].tolist()
        )

    def prepare(self) -> "Future[Search]":
        """Make the search in a thread, once; and after it the better map."""
        with self._lock:
            if self._search is None:
                self._search = Future()
                threading.Thread(target=self._prepare, args=(self._search,), daemon=True).start()
            return self._search

    def search(self) -> "Search":
        """The search; waits until it is made."""
        return self.prepare().result()

    def _prepare(self, made: "Future[Search]") -> None:
        try:
            from simsiam_dali.embedding.records import read_same_audio
            from simsiam_dali.recommendation.library import Library
            from simsiam_dali.serving.search import Search  # takes scikit-learn along

            threadpool_limits(1, user_api="blas")  # of the libraries that came with the search
            same_audio = read_same_audio(self._file, self._songs.provenance.get("shards", ""), self.table["path"])
            library = Library(self.table.copy(deep=False), self.music, same_audio)
            made.set_result(Search(library, self._songs.unit()))
        except BaseException as e:
            made.set_exception(e)  # raised where the search is asked for
            if self._closed:  # an import that comes after the interpreter's shutdown began may fail
                return
            raise
        self.positions.compute()

    def close(self) -> None:
        """The server stops: what is still being prepared is not needed, and does not report errors."""
        self._closed = True
        self.positions.close()

    def page_data(self) -> bytes:
        """JSON of what the page shows, a list for each tag with a value for each song."""
        table = self.table
        coloured = {name: categories(labels) for name, labels in kinds(table).items()}
        # Lists: to iterate over a column of text is ten times slower.
        names = zip(table["title"].tolist(), table["path"].tolist(), strict=True)
        owners = zip(table["artists"].tolist(), table["album_artist"].tolist(), strict=True)
        data: dict[str, Any] = {
            "title": [title or Path(path).stem for title, path in names],
            "artist": [", ".join(artists) or owner for artists, owner in owners],
            "album": [", ".join(albums) for albums in table["albums"]],
            "genre": [", ".join(genres) for genres in table["genres"]],
            "year": or_none(table["year"].to_numpy(float, na_value=math.nan), 0),
            "seconds": or_none(table["duration"].to_numpy(float), 1),
            "rating": or_none(self.ratings.values, 3),
            "colour_by": most_coloured(int(np.isfinite(self.ratings.values).sum()), coloured),
            "kinds": {name: {"names": own, "of": index.tolist()} for name, (own, index) in coloured.items()},
            "palette": PALETTE,
            "other": OTHER,
        }
        return json.dumps(data, separators=(",", ":")).encode()


def or_none(numbers: np.ndarray, digits: int) -> list[float | None]:
    """Numbers rounded, None for NaN and infinities, which JSON does not have."""
    return [number if math.isfinite(number) else None for number in numbers.round(digits).tolist()]


def as_bytes(points: np.ndarray) -> bytes:
    """Float32, little-endian, x and y in turn."""
    return points.astype("<f4").tobytes()
