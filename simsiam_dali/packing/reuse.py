"""Reuse the songs of the set in place, so that packing again decodes new ones only."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from simsiam_dali.data.format import FILES, read_index
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.packing.ffmpeg import UNOPENED
from simsiam_dali.packing.find import SongFile
from simsiam_dali.packing.pack_song import Cut, DecodeSettings, Packed, Refused
from simsiam_dali.packing.write import ROWS_IN_MEMORY

SONG_COLUMNS = ("sample_rate", "channels", "duration", "audio_hash", "split")
SEGMENT_COLUMNS = ("song", "shard", "start", "seconds", "sample_rate")
"""Columns of the old set's tables that are needed: the others would only use memory."""


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


class PackedBefore:
    """The results for files that need not be decoded again, assembled on request.

    There are none if `settings` differ from those of the set `old`, nor for songs with a segment in a `damaged` shard.
    Of `old`, SONG_COLUMNS and SEGMENT_COLUMNS are read.
    """

    def __init__(self, old: ShardSet, settings: DecodeSettings, damaged: set[str]) -> None:
        self._root = old.root
        self._songs, self._segments = ({name: t[name].to_numpy() for name in t} for t in (old.songs, old.segments))
        self._of_file: dict[tuple[str, int, int], Refused | tuple[int, str]] = {}  # a song's number and its note
        if any(old.manifest.settings[name] != value for name, value in asdict(settings).items()):
            return
        self._places = np.zeros((len(old.segments), 2), np.int64)  # of each segment: offset and bytes in its tar
        song, lost = self._segments["song"], set[int]()
        for shard, rows in old.segments.groupby("shard").indices.items():
            if shard in damaged or shard not in old.manifest.files:
                lost |= set(song[rows].tolist())
                continue
            members = read_index((old.root / str(shard)).with_suffix(".idx"))
            self._places[rows] = [sample[old.codec][:2] for sample in members]
        self._rows = np.lexsort((self._segments["start"], song))  # the segments, song by song
        self._first = np.searchsorted(song[self._rows], np.arange(len(old.songs) + 1))
        for file in _rows(old.root / FILES):
            key = file["path"], file["bytes"], file["mtime_ns"]
            if file["status"] == "refused":
                # Opening a file is quick, and newer decoders may be able to.
                if not file["retry"] and not file["reason"].startswith(UNOPENED):
                    self._of_file[key] = Refused(file["reason"])
            elif file["song"] not in lost and len(self._rows_of(file["song"])):
                self._of_file[key] = file["song"], file["reason"]

    def of(self, file: SongFile) -> Packed | Refused | None:
        """The result for this file, None if it is new or has to be decoded again."""
        found = self._of_file.get((file.name, file.bytes, file.mtime_ns))
        if found is None or isinstance(found, Refused):
            return found
        number, note = found
        songs, segments, rows = self._songs, self._segments, self._rows_of(number)
        return Packed(
            sample_rate=int(segments["sample_rate"][rows[0]]),
            source_rate=int(songs["sample_rate"][number]),
            channels=int(songs["channels"][number]),
            duration=float(songs["duration"][number]),
            audio_hash=songs["audio_hash"][number],
            note=note,
            cuts=tuple(
                Cut(
                    float(segments["start"][row]),
                    float(segments["seconds"][row]),
                    self._root / segments["shard"][row],
                    *self._places[row].tolist(),
                )
                for row in rows
            ),
        )

    def _rows_of(self, song: int) -> np.ndarray:
        """The song's rows of the segment table, in the song's order."""
        return self._rows[self._first[song] : self._first[song + 1]]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as table:
        for part in table.iter_batches(ROWS_IN_MEMORY):
            yield from part.to_pylist()
