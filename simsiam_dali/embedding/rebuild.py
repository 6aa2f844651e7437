"""Make the new embedding table from the old one: rows whose files are as they were are kept, others are made again."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from simsiam_dali.embedding.records import FileRecord
from simsiam_dali.embedding.table import Embeddings
from simsiam_dali.evaluation.within_song import WithinSong
from simsiam_dali.packing.ratings import RatingsFile
from simsiam_dali.packing.tags import merged, read_tags

Row = dict[str, Any]


@dataclass
class Report:
    """What has changed, each song by its file. `moved`: pairs (old, new); `duplicates`: (file, the song's file).

    `matched`: how many songs a ratings file rates, or says are unrated; None without one.
    """

    new: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    retagged: list[str] = field(default_factory=list)
    moved: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    matched: int | None = None


def by_song(records: Iterable[FileRecord]) -> dict[str, list[FileRecord]]:
    """Audio hash -> the song's files; songs in the order of their first file, as packing has them."""
    songs: dict[str, list[FileRecord]] = {}
    for record in sorted(records, key=lambda record: record.path):
        if record.audio_hash:
            songs.setdefault(record.audio_hash, []).append(record)
    return songs


class TableBuilder:
    """The new table, from the old one (None: there is none), the old and the new records, and what was embedded.

    vectors: `(D,)` float32 by audio hash, of songs that are not in the old table. within: of their segments, which are
    pooled with those of the old table. durations: of decoded songs, s, by audio hash. paths: of the files by name.
    """

    def __init__(
        self,
        old: Embeddings | None,
        before: Mapping[str, FileRecord],
        after: Mapping[str, FileRecord],
        vectors: Mapping[str, np.ndarray],
        within: WithinSong | None,
        durations: Mapping[str, float],
        paths: Mapping[str, Path],
    ) -> None:
        self.old, self.before, self.after = old, before, after
        self._vectors, self._durations, self._paths = vectors, durations, paths
        self._within = [own for own in (old and old.within, within) if own]
        self._old_songs = by_song(before.values())
        rows = [] if old is None else old.table["path"].tolist()
        self._row = {before[path].audio_hash: number for number, path in enumerate(rows)}
        self.report = Report()

    def build(self, provenance: dict[str, str], music: Path, ratings: RatingsFile | None) -> Embeddings:
        """The table, sorted by path. A row whose files are as they were is kept as it is, its vector bit for bit.

        ratings: override those of the tags and of the old table, also where they say that a song is unrated.
        """
        songs = {h: f for h, f in by_song(self.after.values()).items() if h in self._row or h in self._vectors}
        kept, made, order = list[int](), list[Row](), list[tuple[bool, int]]()
        for audio_hash, files in songs.items():
            row = self._row.get(audio_hash)
            if row is not None and files == self._old_songs[audio_hash]:
                order.append((False, len(kept)))
                kept.append(row)
            else:
                order.append((True, len(made)))
                made.append(self._song_row(audio_hash, files, music))
                self._report(audio_hash, files, made[-1])
        lost = (self._old_path(number) for audio_hash, number in self._row.items() if audio_hash not in songs)
        self.report.gone = [path for path in lost if not self._now(path)]
        in_order = [number + is_made * len(kept) for is_made, number in order]
        tables = [] if self.old is None else [self.old.table.iloc[kept]]
        if made:
            tables.append(_frame(made))
        table = pd.concat(tables, ignore_index=True).iloc[in_order].reset_index(drop=True)
        table["song"] = np.arange(len(table), dtype=np.int64)
        if ratings is not None:
            rows = zip(table.to_dict("records"), songs.values(), strict=True)
            found = [self._rating(ratings, music, song, files) for song, files in rows]
            self.report.matched = sum(rating is not None for rating in found)
            before = zip(found, table["rating"], strict=True)
            table["rating"] = [old if rating is None else rating for rating, old in before]
        # Stacked from rows: the vectors of a large table are copied once.
        vectors = np.stack([self._vector(audio_hash) for audio_hash in songs])
        scale = vectors.std(axis=0)
        within = functools.reduce(lambda one, other: one.pooled(other, scale), self._within) if self._within else None
        return Embeddings(table, vectors, provenance, within)

    def _vector(self, audio_hash: str) -> np.ndarray:
        row = self._row.get(audio_hash)
        if row is None:
            return self._vectors[audio_hash]
        assert self.old is not None
        vector: np.ndarray = self.old.vectors[row]
        return vector

    def _song_row(self, audio_hash: str, files: list[FileRecord], music: Path) -> Row:
        """The row of a song that is new, or one of whose files has come, gone or changed: its tags are read again."""
        tags = functools.reduce(merged, (read_tags(self._paths.get(f.path, music / f.path)) for f in files))
        row: Row = {"song": 0, "path": files[0].path} | dataclasses.asdict(tags) | {"split": ""}
        del row["note"]
        row |= {name: list(row[name]) for name in ("artists", "albums", "genres")}
        if (number := self._row.get(audio_hash)) is None:
            return row | {"duration": self._durations[audio_hash]}
        assert self.old is not None
        before = self.old.table.iloc[number]
        rating = before["rating"] if math.isnan(tags.rating) else tags.rating  # it may be from a file of ratings
        return row | {"duration": before["duration"], "split": before["split"], "rating": rating}

    def _report(self, audio_hash: str, files: list[FileRecord], row: Row) -> None:
        number, path, report = self._row.get(audio_hash), row["path"], self.report
        old_path = None if number is None else self._old_path(number)
        is_there = old_path is not None and self._now(old_path) == audio_hash
        if number is None or old_path is None:
            before = self.before.get(path)
            (report.changed if before and before.audio_hash else report.new).append(path)
        elif not is_there:
            report.moved.append((old_path, path))
        elif old_path == path and self.old is not None:
            columns = self.old.table.columns.drop("song")
            if _comparable(self.old.table.iloc[[number]][columns]) != _comparable(_frame([row])[columns]):
                report.retagged.append(path)
        known = {file.path for file in self._old_songs.get(audio_hash, [])}
        song = old_path if old_path and is_there else path
        report.duplicates += [(file.path, song) for file in files if file.path not in (*known, song)]

    def _old_path(self, number: int) -> str:
        assert self.old is not None
        return str(self.old.table["path"].iloc[number])

    def _now(self, path: str) -> str:
        """Audio hash of what is at `path` now, "" for nothing."""
        return self.after[path].audio_hash if path in self.after else ""

    def _rating(
        self, ratings: RatingsFile, music: Path, song: Mapping[Any, Any], files: list[FileRecord]
    ) -> float | None:
        """By its row's file, else by another one of the same audio; None where no file of it is in `ratings`."""
        names = dict.fromkeys([song["path"], *(file.path for file in files)])
        paths = (self._paths.get(name, music / name) for name in names)
        found = (ratings.lookup(path, song["title"], song["artists"]) for path in paths)
        return next((rating for rating in found if rating is not None), None)


def same_songs(a: Embeddings, b: Embeddings) -> bool:
    """Whether two tables have the same rows and vectors."""
    if list(a.table.columns) != list(b.table.columns) or len(a.table) != len(b.table):
        return False
    return bool(np.array_equal(a.vectors, b.vectors)) and _comparable(a.table) == _comparable(b.table)


def _frame(rows: list[Row]) -> pd.DataFrame:
    columns = [
        "song",
        "path",
        "title",
        "artists",
        "albums",
        "album_artist",
        "year",
        "genres",
        "rating",
        "duration",
        "split",
    ]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype({"year": "Int64", "rating": "float64", "duration": "float64"})


def _comparable(table: pd.DataFrame) -> list[tuple[Any, ...]]:
    """The rows, with None for every missing number, which is not equal to itself."""
    columns = [
        [None if value is pd.NA or (isinstance(value, float) and math.isnan(value)) else value for value in table[name]]
        for name in table
    ]
    return list(zip(*columns, strict=True))
