"""From packed songs to the rows and samples of a shard set: duplicates merged, segments shuffled."""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from simsiam_dali.data.shards import SPLITS
from simsiam_dali.packing.find import SongFile
from simsiam_dali.packing.pack_song import Cut, Packed, PackSettings, Refused, Result
from simsiam_dali.packing.tags import Tags, merged

Row = dict[str, Any]
Results = list[tuple[SongFile, Result]]


@dataclass(slots=True)
class Song:
    """A song of the set; `file` is the first by name of those that hold its audio, `others` are the rest."""

    file: SongFile
    packed: Packed
    tags: Tags
    others: list[SongFile] = field(default_factory=list)
    split: str = ""


def distinct_songs(results: Results) -> list[Song]:
    """One song for each audio, its files' tags merged, in the order of the files."""
    songs: dict[str, Song] = {}
    for file, result in results:
        if isinstance(result.outcome, Packed):
            song = songs.setdefault(result.outcome.audio_hash, Song(file, result.outcome, result.tags))
            if song.file is not file:
                song.others.append(file)
                song.tags = merged(song.tags, result.tags)
    return list(songs.values())


def shuffled_cuts(songs: list[Song], seed: int) -> list[tuple[int, Cut]]:
    """(song row, segment) in the order of the rows: train first, each split in a random order of its own."""
    order: list[tuple[int, Cut]] = []
    for number, split in enumerate(SPLITS):
        cuts = [(i, cut) for i, song in enumerate(songs) if song.split == split for cut in song.packed.cuts]
        order += [cuts[i] for i in np.random.default_rng([seed, number]).permutation(len(cuts))]
    return order


def segment_rows(songs: list[Song], order: list[tuple[int, Cut]], settings: PackSettings) -> Iterator[Row]:
    """The segment table, which also says which shard each goes to."""
    in_split: Counter[str] = Counter()
    for row, (song, cut) in enumerate(order):
        split = songs[song].split
        yield {
            "song": song,
            "key": f"{row:09d}",
            "split": split,
            "shard": f"{split}-{in_split[split] // settings.segments_per_shard:06d}.tar",
            "start": cut.start,
            "seconds": cut.seconds,
            "sample_rate": songs[song].packed.sample_rate,
        }
        in_split[split] += 1


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


def file_rows(songs: list[Song], results: Results) -> Iterator[Row]:
    """The table of files seen, by which the next run knows what it need not decode."""
    row_of = {song.packed.audio_hash: row for row, song in enumerate(songs)}
    for file, result in results:
        seen = {"path": file.name, "bytes": file.bytes, "mtime_ns": file.mtime_ns, "retry": False}
        if isinstance(result.outcome, Packed):
            row = row_of[result.outcome.audio_hash]
            status = "ok" if songs[row].file is file else "duplicate"
            yield seen | {"status": status, "reason": result.outcome.note, "song": row}
        elif result.outcome.audio:
            refused = {"status": "refused", "reason": result.outcome.reason, "retry": result.outcome.retry}
            yield seen | refused


def refused_csv(results: Results) -> bytes:
    """`path,reason` of every file that holds no song though it should."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["path", "reason"])
    for file, result in results:
        if isinstance(result.outcome, Refused) and result.outcome.audio:
            writer.writerow([file.name, result.outcome.reason])
    return out.getvalue().encode()


def counts(songs: list[Song], segments: Iterable[Row]) -> dict[str, int]:
    """Numbers for people: songs, duplicate files, seconds of music, songs and segments of each split."""
    split_of = Counter(song.split for song in songs)
    segments_of = Counter(segment["split"] for segment in segments)
    return {
        "songs": len(songs),
        "duplicates": sum(len(song.others) for song in songs),
        "seconds": round(sum(song.packed.duration for song in songs)),
        **{f"{split}_songs": split_of[split] for split in SPLITS},
        **{f"{split}_segments": segments_of[split] for split in SPLITS},
    }


def sample(row: int, cut: Cut, song: Row, codec: str) -> dict[str, bytes]:
    """The parts of one sample; `song` is its row in the song table."""
    with cut.file.open("rb") as file:
        file.seek(cut.offset)
        audio = file.read(cut.size)
    about = {
        "title": song["title"],
        "artist": "; ".join(song["artists"]),
        "albums": song["albums"],
        "year": song["year"],
        "genres": song["genres"],
        "rating": None if math.isnan(song["rating"]) else song["rating"],  # JSON has no NaN
        "start": cut.start,
        "seconds": cut.seconds,
        "path": song["path"],
    }
    text = json.dumps(about, ensure_ascii=False).encode()
    return {codec: audio, "row": row.to_bytes(8, "little"), "json": text}
