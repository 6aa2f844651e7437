"""Assemble packed songs into the rows and samples of a shard set: merge duplicates, shuffle segments.

The result for each file is on the disk, so that memory does not grow with the library.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import pickle
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Generic, TypeVar

import numpy as np

from simsiam_dali.data.format import SPLITS
from simsiam_dali.packing.find import SongFile
from simsiam_dali.packing.pack_song import Packed, Result
from simsiam_dali.packing.tags import Tags, merged

T = TypeVar("T")
Row = dict[str, Any]
Shards = Mapping[str, np.ndarray]
"""Name of each shard -> its segments, int32 `(n, 2)`: the song, and which of its segments. In the order of the rows."""


class Spool(Generic[T]):
    """A list of `length` items, each set once; 8 bytes of memory each.

    The items are pickled into a nameless file in `folder`, which no other process can write. Raises `OSError` if the
    disk is full, or for an item that was not set.
    """

    def __init__(self, length: int, folder: Path) -> None:
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as the list
        self._starts = array("q", [-1]) * length

    def __len__(self) -> int:
        return len(self._starts)

    def __setitem__(self, index: int, item: T) -> None:
        self._starts[index] = self._file.seek(0, os.SEEK_END)
        pickle.dump(item, self._file, pickle.HIGHEST_PROTOCOL)

    def __getitem__(self, index: int) -> T:
        self._file.seek(self._starts[index])
        item: T = pickle.load(self._file)
        return item

    def __iter__(self) -> Iterator[T]:
        return (self[index] for index in range(len(self)))


Results = Spool[tuple[SongFile, Result]]
"""The result for each file, in the order of the files."""


@dataclass(frozen=True, slots=True)
class Song:
    """A song of the set; `file` is the first by name of those that hold its audio, `others` are the rest."""

    file: SongFile
    packed: Packed
    tags: Tags
    others: tuple[SongFile, ...]
    split: str


class Songs:
    """One song for each audio, its files' tags merged, in the order of the files.

    A song is assembled from `results` on request; only numbers are kept in memory, its split (set `splits`) and its
    rating in a ratings file (`ratings`, by the song's number). `of_file`: each file's song, -1 for none; `first`: the
    number of the file that each song is packed from.
    """

    def __init__(self, results: Results) -> None:
        self._results = results
        self.first, self._more = array("q"), dict[int, list[int]]()
        self.of_file = array("q")
        self.cuts, self.seconds = array("q"), 0.0  # segments of each song; duration of all
        self.splits: list[str] = []
        self.ratings: dict[int, float] = {}
        numbers: dict[bytes, int] = {}
        for index, (_, result) in enumerate(results):
            if not isinstance(result.outcome, Packed):
                self.of_file.append(-1)
                continue
            number = numbers.setdefault(bytes.fromhex(result.outcome.audio_hash), len(numbers))
            self.of_file.append(number)
            if number < len(self.first):
                self._more.setdefault(number, []).append(index)
            else:
                self.first.append(index)
                self.cuts.append(len(result.outcome.cuts))
                self.seconds += result.outcome.duration

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, number: int) -> Song:
        indices = self.first[number], *self._more.get(number, ())
        (file, result), *others = (self._results[index] for index in indices)
        assert isinstance(result.outcome, Packed)
        tags = functools.reduce(merged, (other.tags for _, other in others), result.tags)
        if number in self.ratings:
            tags = dataclasses.replace(tags, rating=self.ratings[number])
        split = self.splits[number] if self.splits else ""
        return Song(file, result.outcome, tags, tuple(other for other, _ in others), split)

    def __iter__(self) -> Iterator[Song]:
        return (self[number] for number in range(len(self)))


def shuffled_shards(songs: Songs, seed: int, segments_per_shard: int) -> Shards:
    """The shards: train first, the segments of each split in a random order."""
    splits, cuts = np.array(songs.splits), np.array(songs.cuts)
    shards = {}
    for number, split in enumerate(SPLITS):
        own = np.flatnonzero(splits == split)
        song = np.repeat(own, cuts[own])
        start_of_song = np.repeat(np.cumsum(cuts[own]) - cuts[own], cuts[own])
        pairs = np.stack([song, np.arange(len(song)) - start_of_song], axis=1).astype(np.int32)
        pairs = pairs[np.random.default_rng([seed, number]).permutation(len(pairs))]
        for start in range(0, len(pairs), segments_per_shard):
            shards[f"{split}-{start // segments_per_shard:06d}.tar"] = pairs[start : start + segments_per_shard]
    return shards


def segment_rows(songs: Songs, shards: Shards) -> Iterator[Row]:
    """The segment table."""
    rows = itertools.count()
    for shard, pairs in shards.items():
        for number, segment in pairs.tolist():
            song = songs[number]
            cut = song.packed.cuts[segment]
            yield {
                "song": number,
                "key": f"{next(rows):09d}",
                "split": song.split,
                "shard": shard,
                "start": cut.start,
                "seconds": cut.seconds,
                "sample_rate": song.packed.sample_rate,
            }


def song_row(song: Song) -> Row:
    """The song table's row."""
    tags, packed = asdict(song.tags), song.packed
    del tags["note"]
    return {
        "path": song.file.name,
        "other_paths": [file.name for file in song.others],
        **tags,
        "duration": packed.duration,
        "sample_rate": packed.source_rate,
        "channels": packed.channels,
        "audio_hash": packed.audio_hash,
        "split": song.split,
        "note": packed.note,
    }


def file_rows(songs: Songs, results: Results) -> Iterator[Row]:
    """The table of all files, by which the next run knows which it need not decode."""
    for index, (file, result) in enumerate(results):
        seen = {"path": file.name, "bytes": file.bytes, "mtime_ns": file.mtime_ns, "retry": False}
        if isinstance(result.outcome, Packed):
            song = songs.of_file[index]
            status = "ok" if songs.first[song] == index else "duplicate"
            yield seen | {"status": status, "reason": result.outcome.note, "song": song}
        elif result.outcome.audio:
            refused = {"status": "refused", "reason": result.outcome.reason, "retry": result.outcome.retry}
            yield seen | refused


def counts(songs: Songs) -> dict[str, int]:
    """Numbers for people: songs, duplicate files, seconds of music, songs and segments of each split."""
    splits, cuts = np.array(songs.splits), np.array(songs.cuts)
    return {
        "songs": len(songs),
        "duplicates": sum(song >= 0 for song in songs.of_file) - len(songs),
        "seconds": round(songs.seconds),
        **{f"{split}_songs": int((splits == split).sum()) for split in SPLITS},
        **{f"{split}_segments": int(cuts[splits == split].sum()) for split in SPLITS},
    }


def samples(songs: Songs, pairs: np.ndarray, first_row: int, codec: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and parts of each sample of a shard; its first one has `first_row`."""
    for row, (number, segment) in enumerate(pairs.tolist(), first_row):
        song = songs[number]
        cut, tags = song.packed.cuts[segment], song.tags
        with cut.file.open("rb") as file:
            file.seek(cut.offset)
            audio = file.read(cut.size)
        about = {
            "title": tags.title,
            "artist": "; ".join(tags.artists),
            "albums": tags.albums,
            "year": tags.year,
            "genres": tags.genres,
            "rating": None if math.isnan(tags.rating) else tags.rating,  # JSON has no NaN
            "start": cut.start,
            "seconds": cut.seconds,
            "path": song.file.name,
        }
        text = json.dumps(about, ensure_ascii=False).encode()
        yield f"{row:09d}", {codec: audio, "row": row.to_bytes(8, "little"), "json": text}
