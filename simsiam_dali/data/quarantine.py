"""The segments of a shard set that no longer decode: `quarantine.csv` beside the shards.

Whoever meets one writes it there, and every loader made later leaves it out from the start. A row of the file counts
for the set whose fingerprint it carries: after packing again nothing is left out, and the file is only ever added to.
"""

import csv
import fcntl
import io
import os
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

import numpy as np
from torch import Tensor
from tqdm import tqdm

from simsiam_dali.common.errors import UserError
from simsiam_dali.data.shards import ShardSet

FILE_NAME = "quarantine.csv"
COLUMNS = ("when", "shard", "key", "row", "song", "reason", "set")
NAMED = 20
"""Segments that the message names when there are too many; the file has them all."""


class Quarantine:
    """What is left out of `shards`: `rows` of its segment table. `limit`: the largest part of the set that may be.

    Raises UserError where the file cannot be read, or where more than `limit` is left out.
    """

    def __init__(self, shards: ShardSet, limit: float) -> None:
        self.path, self.limit = shards.root / FILE_NAME, limit
        self._shards = shards
        self.rows: set[int] = set()
        self.read()
        self.check()

    def read(self) -> None:
        """Take up what other processes have added."""
        try:
            with self.path.open(newline="") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                self._take(file)
        except FileNotFoundError:
            return
        except OSError as e:
            raise UserError(f"{self.path} cannot be read ({e.strerror})") from e

    def add(self, found: Mapping[int, str]) -> None:
        """Put rows, each with the reason, into the file and say so. Raises UserError when they become too many.

        What another process has put there meanwhile is neither written nor said again.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            with self.path.open("a+", newline="") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # other ranks and runs write it too
                file.seek(0)
                self._take(file)
                new = [(row, reason) for row, reason in sorted(found.items()) if row not in self.rows]
                lines = io.StringIO()
                writer = csv.writer(lines, lineterminator="\n")
                if os.fstat(file.fileno()).st_size == 0:
                    writer.writerow(COLUMNS)
                for row, reason in new:
                    shard, key, song = self.describe(row)
                    writer.writerow([now, shard, key, row, song, reason, self._shards.fingerprint])
                file.write(lines.getvalue())
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise UserError(f"{self.path} cannot be written ({e.strerror}); it should get {self.names(found)}") from e
        for row, reason in new:
            line = f"left out from here on: {self.names([row])}: {reason}"
            tqdm.write(line if line.isprintable() else ascii(line), file=sys.stderr)
        self.rows |= found.keys()
        self.check()

    def check(self) -> None:
        """Raise UserError, with the list, when more of the set is left out than `data.max_bad_fraction`."""
        total = len(self._shards.segments)
        if len(self.rows) > self.limit * total:
            raise UserError(
                f"{len(self.rows)} of {total} segments do not decode, more than data.max_bad_fraction = {self.limit:g}:"
                f" {self.names(self.rows)}; all are in {self.path}: see"
                " python -m simsiam_dali.pack --verify, and pack again"
            )

    def describe(self, row: int) -> tuple[str, str, str]:
        """(shard, key, the song's path) of a row."""
        segment = self._shards.segments.iloc[row]
        return segment["shard"], segment["key"], self._shards.songs["path"].iloc[segment["song"]]

    def names(self, rows: Iterable[int]) -> str:
        """`SHARD KEY (song)` of the first rows, in one line."""
        rows = sorted(rows)
        more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        return ", ".join("{} {} ({})".format(*self.describe(row)) for row in rows[:NAMED]) + more

    def by_shard(self, rows: Iterable[int]) -> dict[str, set[int]]:
        """The rows under the names of their shards."""
        rows = np.array(sorted(rows), np.int64)
        grouped = self._shards.segments["shard"].iloc[rows].groupby(self._shards.segments["shard"].iloc[rows])
        return {str(shard): set(map(int, group.index)) for shard, group in grouped}

    def holds(self, rows: Tensor) -> Tensor:
        """Which of `rows (B,)` are rows of the segment table: others are read from damaged bytes."""
        return (rows >= 0) & (rows < len(self._shards.segments))

    def _take(self, file: io.TextIOBase) -> None:
        total = len(self._shards.segments)
        for number, line in enumerate(csv.DictReader(file), 2):
            if line.get("set") == self._shards.fingerprint:
                if not ((line["row"] or "").isdecimal() and int(line["row"]) < total):
                    raise UserError(f"{self.path} line {number} names no segment: mend the line, or move the file")
                self.rows.add(int(line["row"]))
