"""Assemble packed songs into the rows and samples of a shard set: merge duplicates, shuffle segments."""

import csv
import dataclasses
import io
import json
import math
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from simsiam_dali.data.format import SPLITS
from simsiam_dali.packing.find import SongFile
from simsiam_dali.packing.pack_song import Packed, Refused, Result
from simsiam_dali.packing.spool import Spool
from simsiam_dali.packing.tags import Tags, merged

Row = dict[str, Any]
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
    rating in a ratings file (`ratings`, by the song's number). `of_file`: each file's song, -1 for none.
    """

    def __init__(self, results: Results) -> None:
        self._results = results
        self._first, self._more = array("q"), dict[int, list[int]]()
        self.of_file = array("q")
        self.cuts, self.seconds = array("q"), 0.0  # segments of each song; duration of all
        self.splits: list[str] = []
        self.ratings: dict[int, float] = {}
        numbers: dict[bytes, int] = {}
        for place, (_, result) in enumerate(results):
            if not isinstance(result.outcome, Packed):
                self.of_file.append(-1)
                continue
            number = numbers.setdefault(bytes.fromhex(result.outcome.audio_hash), len(numbers))
            self.of_file.append(number)
            if number < len(self._first):
                self._more.setdefault(number, []).append(place)
            else:
                self._first.append(place)
                self.cuts.append(len(result.outcome.cuts))
                self.seconds += result.outcome.duration

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, number: int) -> Song:
        file, result = self._results[self._first[number]]
        assert isinstance(result.outcome, Packed)
        tags, others = result.tags, []
        for place in self._more.get(number, ()):
            other, same = self._results[place]
            others.append(other)
            tags = merged(tags, same.tags)
        if number in self.ratings:
            tags = dataclasses.replace(tags, rating=self.ratings[number])
        return Song(file, result.outcome, tags, tuple(others), self.splits[number] if self.splits else "")

    def __iter__(self) -> Iterator[Song]:
        return (self[number] for number in range(len(self)))

    def is_first(self, place: int) -> bool:
        """Whether this file is the one its song is packed from."""
        return self._first[self.of_file[place]] == place

    @property
    def duplicates(self) -> int:
        """Files whose audio is that of an earlier one."""
        return sum(map(len, self._more.values()))


def shuffled_cuts(songs: Songs, seed: int) -> np.ndarray:
    """Each row's song and segment of it, int32 [segments, 2]: train first, each split in a random order of its own."""
    splits, cuts = np.array(songs.splits), np.array(songs.cuts)
    order = []
    for number, split in enumerate(SPLITS):
        own = np.flatnonzero(splits == split)
        song = np.repeat(own, cuts[own])
        start_of_song = np.repeat(np.cumsum(cuts[own]) - cuts[own], cuts[own])
        pairs = np.stack([song, np.arange(len(song)) - start_of_song], axis=1).astype(np.int32)
        order.append(pairs[np.random.default_rng([seed, number]).permutation(len(pairs))])
    return np.concatenate(order)


def shards_of(songs: Songs, order: np.ndarray, segments_per_shard: int) -> Iterator[str]:
    """The shard of each row of `order`."""
    in_split: Counter[str] = Counter()
    for song in order[:, 0]:  # not .tolist(): Python's numbers of 400,000 segments are 40 MB
        split = songs.splits[song]
        yield f"{split}-{in_split[split] // segments_per_shard:06d}.tar"
        in_split[split] += 1


def segment_rows(songs: Songs, order: np.ndarray, segments_per_shard: int) -> Iterator[Row]:
    """The segment table, with the shard of each segment."""
    shards = shards_of(songs, order, segments_per_shard)
    for row, (pair, shard) in enumerate(zip(order, shards, strict=True)):
        number, segment = pair.tolist()
        song = songs[number]
        cut = song.packed.cuts[segment]
        yield {
            "song": number,
            "key": key(row),
            "split": song.split,
            "shard": shard,
            "start": cut.start,
            "seconds": cut.seconds,
            "sample_rate": song.packed.sample_rate,
        }


def key(row: int) -> str:
    """A sample's name in its tar."""
    return f"{row:09d}"


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
    for place, (file, result) in enumerate(results):
        seen = {"path": file.name, "bytes": file.bytes, "mtime_ns": file.mtime_ns, "retry": False}
        if isinstance(result.outcome, Packed):
            status = "ok" if songs.is_first(place) else "duplicate"
            yield seen | {"status": status, "reason": result.outcome.note, "song": songs.of_file[place]}
        elif result.outcome.audio:
            refused = {"status": "refused", "reason": result.outcome.reason, "retry": result.outcome.retry}
            yield seen | refused


def refused_csv(results: Results) -> bytes:
    """`path,reason` of every audio file that is not packed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["path", "reason"])
    for file, result in results:
        if isinstance(result.outcome, Refused) and result.outcome.audio:
            writer.writerow([file.name, result.outcome.reason])
    return out.getvalue().encode()


def counts(songs: Songs) -> dict[str, int]:
    """Numbers for people: songs, duplicate files, seconds of music, songs and segments of each split."""
    split_of = Counter(songs.splits)
    segments_of: Counter[str] = Counter()
    for split, cuts in zip(songs.splits, songs.cuts, strict=True):
        segments_of[split] += cuts
    return {
        "songs": len(songs),
        "duplicates": songs.duplicates,
        "seconds": round(songs.seconds),
        **{f"{split}_songs": split_of[split] for split in SPLITS},
        **{f"{split}_segments": segments_of[split] for split in SPLITS},
    }


def sample(row: int, song: Song, segment: int, codec: str) -> dict[str, bytes]:
    """The parts of one sample: `segment` of the song."""
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
    return {codec: audio, "row": row.to_bytes(8, "little"), "json": text}
