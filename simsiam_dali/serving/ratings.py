"""Ratings given on the page: a CSV that `pack --ratings` reads, written anew after each of them.

All other rows and columns of the file stay, with its delimiter, line ends and byte order mark. Its ratings are written
as 0..1: a file of 0..5 would be read as 0..1 once none of its ratings is above 1. A removed rating is an empty one,
which means that the song is unrated.
"""

import math
import os
import unicodedata
from pathlib import Path
from threading import Lock

import pandas as pd

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import atomic_write, refuse_failed_write
from simsiam_dali.packing.find import file_of
from simsiam_dali.packing.ratings import DATABASE, RatingsCsv, RatingsFile

COLUMNS = ("path", "title", "artist", "rating")


class Ratings:
    """The ratings of a table's songs: those of the CSV `source`, else those of the table.

    Raises UserError for a file that is there and is no such CSV.
    """

    def __init__(self, source: Path, table: pd.DataFrame, music: Path) -> None:
        self._source, self._table, self._music, self._lock = source, table, music, Lock()
        self._tags = table["rating"].to_numpy(float)
        self.values = self._tags.copy()
        """`(N,)`, 0..1, NaN = unrated."""
        self._take(RatingsFile.of_csv(self._read(), source, music))

    def _take(self, ratings: RatingsFile) -> None:
        """Take the ratings of the file's songs."""
        # A look-up resolves links on the disk: only for songs that share a file name or a title with a row.
        names = {Path(path).name for path in ratings.by_path}
        titles = {title for _, title, _ in ratings.by_name}
        for row, (path, title) in enumerate(zip(self._table["path"], self._table["title"], strict=True)):
            if _nfc(path.rpartition("/")[2]) in names or _nfc(title).casefold() in titles:
                self.values[row] = self._value(ratings, row)

    def _value(self, ratings: RatingsFile, row: int) -> float:
        path, title, artists = self._named(row)
        found = ratings.lookup(file_of(path, self._music), title, artists)
        return self._tags[row] if found is None else found

    def _named(self, row: int) -> tuple[str, str, list[str]]:
        """A song's path, title and artists."""
        path, title, artists = (self._table[name].iloc[row] for name in ("path", "title", "artists"))
        return path, title, artists

    def rate(self, row: int, rating: float | None) -> float:
        """Keep a rating, 0..1, or with None that the song is unrated; returns what its rating now is, NaN = none.

        Raises UserError when the file cannot be written, or no longer read: it is then as it was.
        """
        with self._lock:
            content = self._read()
            self._put(content, row, rating)
            ratings = RatingsFile.of_csv(content, self._source, self._music)
            with refuse_failed_write(self._source, "choose another file with --ratings"):
                self._source.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(self._source) as part:
                    part.write_bytes(content.to_bytes())
            self.values[row] = self._value(ratings, row)
            return float(self.values[row])

    def _read(self) -> RatingsCsv:
        """The file's content; without a header where there is no file yet, or an empty one."""
        try:
            raw = self._source.read_bytes()
        except FileNotFoundError:
            raw = b""
        except OSError as e:
            raise UserError(f"--ratings {self._source}: {e.strerror}") from e
        if raw.startswith(DATABASE):
            raise UserError(f"--ratings {self._source} is a player's database, which is only read: name a CSV to write")
        return RatingsCsv.parse(raw, self._source)

    def _put(self, content: RatingsCsv, row: int, rating: float | None) -> None:
        """Put one rating more, or another, into the content of the file."""
        ratings = content.ratings(self._source)  # refuses what pack would
        if any(len(cells) > len(content.header) for cells in content.rows):
            raise UserError(f"--ratings {self._source}: a line has more cells than the header")
        content.header += [name for name in COLUMNS if name not in content.column_numbers()]
        column = content.column_numbers()
        for cells in content.rows:
            cells += [""] * (len(content.header) - len(cells))
        if any(number > 1 for number in ratings):
            for cells, number in zip(content.rows, ratings, strict=True):
                cells[column["rating"]] = "" if math.isnan(number) else f"{number / 5:g}"
        own = self._own_cells(row)
        mine = self._rows_of(own, content)
        if not mine:
            mine = [[""] * len(content.header)]
            content.rows += mine
            for name, text in own.items():
                mine[0][column[name]] = text
        for cells in mine:
            cells[column["rating"]] = "" if rating is None else f"{rating:g}"

    def _own_cells(self, row: int) -> dict[str, str]:
        """The cells by which the file names a song. Raises UserError where it cannot."""
        path, title, artists = self._named(row)
        if os.fsencode(file_of(path, self._music)) != os.fsencode(self._music / path):
            # No UTF-8 holds the file's name, so it is known by its title.
            if not title:
                raise UserError("a song without a title whose file name is not UTF-8 cannot be named in a CSV")
            path = ""
        return {"path": path, "title": title, "artist": ", ".join(artists)}

    def _rows_of(self, own: dict[str, str], content: RatingsCsv) -> list[list[str]]:
        """The rows of the song whose cells are `own`."""
        # Spaces around a path are compared: they belong to the file's name, and the song without them is another.
        path = self._compared(own["path"]) if own["path"] else ""

        def is_mine(there: str, title: str, artist: str) -> bool:
            if path or there.strip():
                return bool(path and there.strip()) and self._compared(there) == path
            return (title, artist) == (own["title"], own["artist"])

        names = zip(*(content.column(name) for name in ("path", "title", "artist")), strict=True)
        return [cells for cells, name in zip(content.rows, names, strict=True) if is_mine(*name)]

    def _compared(self, path: str) -> str:
        return _nfc(os.path.normpath(os.path.join(self._music, path)))  # noqa: PTH118 - thousands of rows


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
