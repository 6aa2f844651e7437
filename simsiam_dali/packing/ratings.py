"""Read ratings from a file: a CSV, or the library database of the Clementine or Strawberry player."""

import codecs
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

DATABASE = b"SQLite format 3\0"


@dataclass
class RatingsCsv:
    """A CSV of ratings, from which the same file can be written again: its cells, and how they were written.

    header: the columns' names; none of a file without text. rows: a list of cells for each line that is not blank, as
    many as it has. Of two columns of one name the last counts.
    """

    header: list[str]
    rows: list[list[str]]
    delimiter: str = ","
    line_end: str = "\n"
    has_mark: bool = False

    @classmethod
    def parse(cls, raw: bytes, source: Path) -> "RatingsCsv":
        """The CSV in the bytes of the file `source`. Raises UserError where they are none."""
        try:
            text = raw.decode("utf-8-sig")
            first = io.StringIO(text.lstrip(), newline="").readline()
            delimiter = ";" if ";" in first and "," not in first else ","
            lines = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if line]
        except (UnicodeDecodeError, csv.Error) as e:
            raise UserError(
                f"--ratings {source}: neither a CSV in UTF-8 nor a Clementine or Strawberry database"
            ) from e
        header, *rows = lines if text.strip() else [[]]
        line_end = "\r\n" if first.endswith("\r\n") else "\n"
        return cls(header, rows, delimiter, line_end, raw.startswith(codecs.BOM_UTF8))

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        out = io.StringIO()
        csv.writer(out, delimiter=self.delimiter, lineterminator=self.line_end).writerows([self.header, *self.rows])
        return codecs.BOM_UTF8 * self.has_mark + out.getvalue().encode()

    def column_numbers(self) -> dict[str, int]:
        """The number of each column, by its name in lower case."""
        return {name.strip().lower(): number for number, name in enumerate(self.header)}

    def column(self, name: str) -> list[str]:
        """The cells of a column, "" where a line has none."""
        number = self.column_numbers().get(name, -1)
        return [row[number] if 0 <= number < len(row) else "" for row in self.rows]

    def ratings(self, source: Path) -> list[float]:
        """The rows' ratings, 0..1 or, if any is above 1, 0..5; NaN = unrated.

        Raises UserError, which names the file `source`, for a header or a number that is not of ratings.
        """
        columns = self.column_numbers()
        if self.header and (
            "rating" not in columns or not ("path" in columns or {"title", "artist"} <= columns.keys())
        ):
            raise UserError(f"--ratings {source}: needs a header with rating, and path or title and artist")
        for line, row in enumerate(self.rows, 2):
            if any(cell.strip() for cell in row[len(self.header) :]):
                raise UserError(
                    f"--ratings {source}, line {line}: more columns than the header; a fraction is written 0.5, and"
                    " text with a comma in quotes"
                )
        ratings = []
        for line, text in enumerate(map(str.strip, self.column("rating")), 2):
            try:
                ratings.append(float(text or "nan"))
            except ValueError as e:
                raise UserError(f"--ratings {source}, line {line}: rating {text!r} is not a number") from e
            if not (math.isnan(ratings[-1]) or 0 <= ratings[-1] <= 5):
                raise UserError(f"--ratings {source}, line {line}: rating {ratings[-1]:g} is not in 0..1 or 0..5")
        return ratings


@dataclass
class RatingsFile:
    """Ratings 0..1 by absolute path and, for a library that has moved, by file name, title and artist.

    music: the library's folder. by_name: the rows of a name, each its path ("" without one) and its rating. NaN: the
    file says that the song is unrated.
    """

    source: Path
    music: Path
    by_path: dict[str, float] = field(default_factory=dict)
    by_name: dict[tuple[str, str, str], list[tuple[str, float]]] = field(default_factory=dict)

    @classmethod
    def read(cls, source: Path, music: Path) -> "RatingsFile":
        """Read a ratings file; neither it nor a journal beside it is ever written.

        CSV: commas or semicolons, a header with `rating` and either `path` (absolute, or relative to `music`) or
        `title` and `artist`; a file without text has no ratings. Ratings are 0..1, or 0..5 if any is above 1. A song
        whose rating is empty is unrated, whatever its tags say, unless another row rates it. A database's ratings are
        0..1; what it has -1 for is not in it.
        """
        try:
            with source.open("rb") as file:
                if file.read(len(DATABASE)) != DATABASE:
                    file.seek(0)
                    return cls.of_csv(RatingsCsv.parse(file.read(), source), source, music)
            ratings = cls(source, music)
            for path, title, artist, rating in _database_rows(source):
                ratings._add(path, title, artist, rating)
        except OSError as e:
            raise UserError(f"--ratings {source}: {e.strerror}") from e
        return ratings

    @classmethod
    def of_csv(cls, content: RatingsCsv, source: Path, music: Path) -> "RatingsFile":
        """The ratings in a CSV that was read from `source`. Raises UserError as `RatingsCsv.ratings` does."""
        ratings, numbers = cls(source, music), content.ratings(source)
        scale = 5 if any(number > 1 for number in numbers) else 1
        base, padded = str(music.absolute()), dict[str, float]()
        cells = zip(*(content.column(name) for name in ("path", "title", "artist")), numbers, strict=True)
        for path, title, artist, number in cells:
            name = path.strip()
            where = os.path.normpath(os.path.join(base, path)) if name else ""  # noqa: PTH118 - thousands of rows
            ratings._add(where, title.strip(), artist.strip(), number / scale)
            if name != path and name:
                padded[_nfc(os.path.normpath(os.path.join(base, name)))] = number / scale  # noqa: PTH118
        # Spaces around a path are part of it, or were put beside the delimiter by hand.
        ratings.by_path = padded | ratings.by_path
        return ratings

    def _add(self, path: str, title: str, artist: str, rating: float) -> None:
        if path and not (math.isnan(rating) and _nfc(path) in self.by_path):
            self.by_path[_nfc(path)] = rating
        # A song that is unrated does not make others of its name unrated.
        if title and not (math.isnan(rating) and path):
            key = _song_key(os.path.basename(path), title, artist)  # noqa: PTH119 - thousands of rows
            self.by_name.setdefault(key, []).append((path, rating))

    def __len__(self) -> int:
        """How many songs the file names, those that it says are unrated among them."""
        return len(self.by_path) or len(self.by_name)

    def lookup(self, path: Path, title: str, artists: Sequence[str]) -> float | None:
        """The rating of the song at `path`, NaN where the file says that it is unrated, None if the file has none."""
        for candidate in (path, path.resolve()):
            if (rating := self.by_path.get(_nfc(_normalised(candidate)))) is not None:
                return rating
        for name in (path.name, ""):
            for artist in (", ".join(artists), *artists):
                if title and (rating := self._of_name(_song_key(name, title, artist), path)) is not None:
                    return rating
        return None

    def _of_name(self, key: tuple[str, str, str], song: Path) -> float | None:
        """The rating that rows of this name give the file `song`; None where they give none, or several."""
        ratings = [rating for path, rating in self.by_name.get(key, ()) if not self._is_of_another(path, song)]
        rated = {rating for rating in ratings if not math.isnan(rating)}
        if len(rated) > 1:
            return None  # ambiguous
        return next(iter(rated), math.nan) if ratings else None

    def _is_of_another(self, path: str, song: Path) -> bool:
        """Whether a row's `path` still lies in the library, and is neither the file `song` nor a copy of it."""
        if not any(Path(path).is_relative_to(folder) for folder in (_normalised(self.music), self.music.resolve())):
            return False
        sizes = {_size(unicodedata.normalize(form, path)) for form in ("NFC", "NFD")} - {None}
        return bool(sizes) and _size(song) not in sizes


def _size(path: str | Path) -> int | None:
    """Bytes of a file, None where it is not there."""
    try:
        return os.stat(path).st_size  # noqa: PTH116 - thousands of rows
    except (OSError, ValueError):
        return None


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
