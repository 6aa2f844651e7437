"""Reuse the songs of the set in place, so that packing again decodes new ones only."""

import itertools
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from simsiam_dali.data.format import FILES, SEGMENTS, SONGS, Manifest, read_index, read_table
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.packing.ffmpeg import UNOPENED
from simsiam_dali.packing.find import SongFile
from simsiam_dali.packing.pack_song import Cut, DecodeSettings, Packed, Refused
from simsiam_dali.packing.write import ROWS_IN_MEMORY


def old_set(root: Path, manifest: Manifest) -> ShardSet:
    """The set in `root`, of its tables the columns that are needed: the others would only use memory."""
    songs = read_table(root / SONGS, ("sample_rate", "channels", "duration", "audio_hash", "split", "rating"))
    segments = read_table(root / SEGMENTS, ("song", "shard", "start", "seconds", "sample_rate"))
    return ShardSet(root, manifest, songs, segments)


def damaged_shards(old: ShardSet) -> set[str]:
    """Names of the tars whose content, or whose index, is not what was packed."""
    return {
        tar
        for tar in old.manifest.files
        if tar.endswith(".tar")
        for path in (old.root / tar, (old.root / tar).with_suffix(".idx"))
        # Read in full, or copying would give a damaged shard a new checksum.
        if old.manifest.files[path.name].problem(path, always_hash=True)
    }


def is_final(reason: str, retry: bool) -> bool:
    """Whether a refused file need not be tried again while its size and its modification time are the same."""
    # Opening a file is quick, and newer decoders may be able to.
    return not retry and not reason.startswith(UNOPENED)


class PackedBefore:
    """The results for files that need not be decoded again, assembled on request.

    There are none if `settings` differ from those of the set `old`, nor for songs with a segment in a `damaged` shard.
    """

    def __init__(self, old: ShardSet, settings: DecodeSettings, damaged: set[str]) -> None:
        self._root = old.root
        self._of_file: dict[tuple[str, int, int], Refused | tuple[int, str]] = {}  # a song's number and its note
        if any(old.manifest.settings[name] != value for name, value in asdict(settings).items()):
            return
        stored, lost = np.zeros((2, len(old.segments)), np.int64), set[int]()
        for shard, rows in old.segments.groupby("shard").indices.items():
            if shard in damaged or shard not in old.manifest.files:
                lost |= set(old.segments["song"].iloc[rows])
                continue
            members = read_index((old.root / str(shard)).with_suffix(".idx"))
            stored[:, rows] = np.transpose([sample[old.codec][:2] for sample in members])
        segments = old.segments.assign(offset=stored[0], size=stored[1]).sort_values(["song", "start"])
        self._first = np.searchsorted(segments["song"], np.arange(len(old.songs) + 1))  # of each song's segments
        self._songs, self._segments = ({name: t[name].to_numpy() for name in t} for t in (old.songs, segments))
        with pq.ParquetFile(old.root / FILES) as table:
            for file in itertools.chain.from_iterable(part.to_pylist() for part in table.iter_batches(ROWS_IN_MEMORY)):
                key, song = (file["path"], file["bytes"], file["mtime_ns"]), file["song"]
                if file["status"] == "refused":
                    if is_final(file["reason"], file["retry"]):
                        self._of_file[key] = Refused(file["reason"])
                elif song not in lost and self._first[song] < self._first[song + 1]:
                    self._of_file[key] = song, file["reason"]

    def of(self, file: SongFile) -> Packed | Refused | None:
        """The result for this file, None if it is new or has to be decoded again."""
        found = self._of_file.get((file.name, file.bytes, file.mtime_ns))
        if found is None or isinstance(found, Refused):
            return found
        number, note = found
        song = {name: column[number] for name, column in self._songs.items()}
        rows = slice(self._first[number], self._first[number + 1])
        segments = {name: column[rows].tolist() for name, column in self._segments.items()}
        columns = (segments[name] for name in ("start", "seconds", "shard", "offset", "size"))
        return Packed(
            sample_rate=segments["sample_rate"][0],
            source_rate=int(song["sample_rate"]),
            channels=int(song["channels"]),
            duration=float(song["duration"]),
            audio_hash=song["audio_hash"],
            note=note,
            cuts=tuple(
                Cut(start, seconds, self._root / shard, offset, size)
                for start, seconds, shard, offset, size in zip(*columns, strict=True)
            ),
        )
