"""Ratings given on the page: a CSV that `make_shards --ratings` reads, written anew after each of them.

All other rows and columns of the file stay. Its ratings are written as 0..1: a file of 0..5 would be read as 0..1 once
none of its ratings is above 1.
"""

import csv
import io
import os
import unicodedata
from pathlib import Path
from threading import Lock

import pandas as pd

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import atomic_write, refuse_failed_write
from simsiam_dali.packing.find import file_of
from simsiam_dali.packing.ratings import RatingsFile

COLUMNS = ("path", "title", "artist", "rating")
_SQLITE = b"SQLite format 3\0"


class Ratings:
    """The ratings of a table's songs: those of the CSV `source`, else those of the table.

    Raises UserError for a file that is there and is no such CSV.
    """

    def __init__(self, source: Path, table: pd.DataFrame, music: Path) -> None:
        self._source, self._table, self._music, self._lock = source, table, music, Lock()
        self._tags = table["rating"].to_numpy(float)
        self.values = self._tags.copy()
        """`(N,)`, 0..1, NaN = unrated."""
        if self._read_text() is not None:
            self._take(RatingsFile.read(source, music))

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
        """Keep a rating, 0..1, or remove it with None; returns what the song's rating now is, NaN = none.

        Raises UserError when the file cannot be written, or no longer read: it is then as it was.
        """
        with self._lock:
            text = self._with_rating(row, rating)
            with refuse_failed_write(self._source, "choose another file with --ratings"):
                self._source.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(self._source) as part:
                    part.write_text(text, encoding="utf-8", newline="")
            self.values[row] = self._value(RatingsFile.read(self._source, self._music), row)
            return float(self.values[row])

    def _read_text(self) -> str | None:
        """The file's text, None where there is no file yet."""
        try:
            raw = self._source.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as e:
            raise UserError(f"--ratings {self._source}: {e.strerror}") from e
        if raw.startswith(_SQLITE):
            raise UserError(f"--ratings {self._source} is a player's database, which is only read: name a CSV to write")
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise UserError(f"--ratings {self._source}: no CSV in UTF-8") from e

    def _with_rating(self, row: int, rating: float | None) -> str:
        """The file's text with one rating more, or another."""
        text, delimiter = self._read_text(), ","
        header, rows = list(COLUMNS), list[dict[str, str]]()
        if text is not None:
            RatingsFile.read(self._source, self._music)  # refuses what make_shards would
            first = text.partition("\n")[0]
            delimiter = ";" if ";" in first and "," not in first else ","
            reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restval="")
            rows, header = list(reader), list(reader.fieldnames or ())
            if any(None in one for one in rows):
                raise UserError(f"--ratings {self._source}: a line has more cells than the header, which would be lost")
        column = {name.strip().lower(): name for name in header}
        header += [name for name in COLUMNS if name not in column]
        column = {name: column.get(name, name) for name in COLUMNS}
        _to_unit_scale(rows, column["rating"])
        path, title, artists = self._named(row)
        own = {"path": path, "title": title, "artist": ", ".join(artists)}
        if os.fsencode(file_of(path, self._music)) != os.fsencode(self._music / path):
            # No UTF-8 holds the file's name, so it is known by its title.
            if not title:
                raise UserError("a song without a title whose file name is not UTF-8 cannot be named in a CSV")
            own["path"] = ""
        number = "" if rating is None else f"{rating:g}"
        mine = [one for one in rows if self._is(one, column, own)]
        for one in mine:
            one[column["rating"]] = number
        if not mine:
            rows.append({column[name]: value for name, value in own.items()} | {column["rating"]: number})
        out = io.StringIO()
        writer = csv.DictWriter(out, header, restval="", delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def _is(self, one: dict[str, str], column: dict[str, str], own: dict[str, str]) -> bool:
        """Whether a row of the file is of the song `own`."""
        path = (one.get(column["path"]) or "").strip()
        if path or own["path"]:
            here, there = (os.path.normpath(self._music / name) for name in (path, own["path"]))
            return bool(path) and bool(own["path"]) and _nfc(here) == _nfc(there)
        return all((one.get(column[name]) or "") == own[name] for name in ("title", "artist"))


def _to_unit_scale(rows: list[dict[str, str]], column: str) -> None:
    """Divide ratings of 0..5 by 5, as `RatingsFile.read` does."""
    numbers = [float((one.get(column) or "").strip() or "nan") for one in rows]
    if any(number > 1 for number in numbers):
        for one, number in zip(rows, numbers, strict=True):
            one[column] = "" if number != number else f"{number / 5:g}"


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
