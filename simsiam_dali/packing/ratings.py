"""Read ratings from a file: a CSV, or the library database of the Clementine or Strawberry player."""

import csv
import io
import math
import os
import sqlite3
import unicodedata
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from simsiam_dali.common.errors import UserError


@dataclass
class RatingsFile:
    """Ratings 0..1 by absolute path and, for a library that has moved, by file name, title and artist."""

    source: Path
    by_path: dict[str, float] = field(default_factory=dict)
    by_name: dict[tuple[str, str, str], float | None] = field(default_factory=dict)

    @classmethod
    def read(cls, source: Path, music: Path) -> "RatingsFile":
        """Read a ratings file; neither it nor a journal beside it is ever written.

        CSV: commas or semicolons, a header with `rating` and either `path` (absolute, or relative to `music`) or
        `title` and `artist`. Ratings are 0..1, or 0..5 if any is above 1; an empty one is unrated. A database's are
        0..1, and -1 is unrated.
        """
        ratings = cls(source)
        try:
            with source.open("rb") as file:
                is_database = file.read(16) == b"SQLite format 3\0"
            for path, title, artist, rating in _database_rows(source) if is_database else _csv_rows(source, music):
                if path:
                    ratings.by_path[_nfc(path)] = rating
                if title:
                    key = _song_key(Path(path).name, title, artist)
                    # Two songs of one name with two ratings: ambiguous.
                    ratings.by_name[key] = rating if ratings.by_name.get(key, rating) == rating else None
        except OSError as e:
            raise UserError(f"--ratings {source}: {e.strerror}") from e
        return ratings

    def __len__(self) -> int:
        return len(self.by_path) or len(self.by_name)

    def lookup(self, path: Path, title: str, artists: Sequence[str]) -> float | None:
        """The rating of the song at `path`, None if the file has none for it."""
        for candidate in (path, path.resolve()):
            if (rating := self.by_path.get(_nfc(_normalised(candidate)))) is not None:
                return rating
        for name in (path.name, ""):
            for artist in (", ".join(artists), *artists):
                if title and (rating := self.by_name.get(_song_key(name, title, artist))) is not None:
                    return rating
        return None


def _csv_rows(source: Path, music: Path) -> Iterator[tuple[str, str, str, float]]:
    try:
        text = source.read_text("utf-8-sig")
        header = text.partition("\n")[0]
        delimiter = ";" if ";" in header and "," not in header else ","
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"--ratings {source}: neither a CSV nor a Clementine or Strawberry database") from e
    columns = {name.strip().lower(): name for name in (rows[0] if rows else {}) if name}
    if "rating" not in columns or not ("path" in columns or {"title", "artist"} <= columns.keys()):
        raise UserError(f"--ratings {source}: needs a header with rating, and path or title and artist")

    def cell(row: dict[str, str], column: str) -> str:
        return (row.get(columns.get(column, "")) or "").strip()

    ratings = []
    for line, row in enumerate(rows, 2):
        text = cell(row, "rating")
        try:
            ratings.append(float(text or "nan"))
        except ValueError as e:
            raise UserError(f"--ratings {source}, line {line}: rating {text!r} is no number") from e
        if not (math.isnan(ratings[-1]) or 0 <= ratings[-1] <= 5):
            raise UserError(f"--ratings {source}, line {line}: rating {ratings[-1]:g} is not in 0..1 or 0..5")
    scale = 5 if any(rating > 1 for rating in ratings) else 1
    for row, rating in zip(rows, ratings, strict=True):
        if not math.isnan(rating):
            path = cell(row, "path")
            yield (_normalised(music / path) if path else "", cell(row, "title"), cell(row, "artist"), rating / scale)


def _database_rows(source: Path) -> Iterator[tuple[str, str, str, float]]:
    uri = f"file:{urllib.parse.quote(_normalised(source))}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            columns = {row[1] for row in connection.execute("PRAGMA table_info(songs)")}
            url = next((name for name in ("url", "filename") if name in columns), None)
            if url is None or not {"title", "artist", "rating"} <= columns:
                raise UserError(f"--ratings {source}: a database, but not Clementine's or Strawberry's")
            query = f"SELECT CAST({url} AS BLOB), title, artist, rating FROM songs WHERE rating BETWEEN 0 AND 1"
            for where, title, artist, rating in connection.execute(query):
                path = where or b""
                if path.startswith(b"file://"):
                    path = urllib.parse.unquote_to_bytes(path.removeprefix(b"file://"))
                yield os.fsdecode(path), title or "", artist or "", float(rating)
    except sqlite3.Error as e:
        raise UserError(f"--ratings {source}: cannot be read as a database ({e})") from e


def _normalised(path: Path) -> str:
    """Absolute and without `..`, but with links unresolved, as a player's paths are."""
    return os.path.normpath(path.absolute())


def _nfc(text: str) -> str:
    # One name may be written with composed or decomposed accents, depending on the system that wrote it.
    return unicodedata.normalize("NFC", text)


def _song_key(name: str, title: str, artist: str) -> tuple[str, str, str]:
    return _nfc(name), _nfc(title).casefold(), _nfc(artist).casefold()
