"""The segments of a shard set that no longer decode: `quarantine.csv` beside the shards.

The loader that finds one appends it there, and every later loader skips it from the start. A row of the file applies to
the set with its fingerprint: after packing again nothing is skipped, and the old rows stay.
"""

import csv
import fcntl
import os
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from simsiam_dali.common.errors import UserError
from simsiam_dali.data.shards import ShardSet

FILE_NAME = "quarantine.csv"
COLUMNS = ("when", "shard", "key", "row", "song", "reason", "set")
MAX_LISTED = 20
"""Segments listed in the error message where there are too many; the file lists all of them."""


class Quarantine:
    """The damaged segments of `shards`: `rows` of its segment table. limit: the largest allowed fraction of the set.

    Raises UserError if the file cannot be read, or if more than `limit` is damaged.
    """

    def __init__(self, shards: ShardSet, limit: float) -> None:
        self.path, self.limit, self._shards = shards.root / FILE_NAME, limit, shards
        self.rows: set[int] = set()
        self.read()
        self.check()

    def read(self) -> None:
        """Read what other processes have added."""
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                self._parse(file)
        except FileNotFoundError:
            return
        except OSError as e:
            raise UserError(f"{self.path} cannot be read ({e.strerror})") from e

    def add(self, found: Mapping[int, str]) -> None:
        """Append rows, each with the reason, to the file and report them. Raises UserError if there are too many.

        Rows that another process has added meanwhile are neither written nor reported again.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            with self.path.open("a+", newline="", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # other ranks and runs write to it too
                file.seek(0)
                self._parse(file)
                file.write(_rest_of_line(self.path))
                new = {row: reason for row, reason in sorted(found.items()) if row not in self.rows}
                writer = csv.writer(file, lineterminator="\n")
                if os.fstat(file.fileno()).st_size == 0:
                    writer.writerow(COLUMNS)
                for row, reason in new.items():
                    shard, key, song = self._describe(row)
                    writer.writerow([now, shard, key, row, song, reason, self._shards.fingerprint])
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise UserError(f"{self.path} cannot be written ({e.strerror}); it should list {self._names(found)}") from e
        for row, reason in new.items():
            line = f"damaged, skipped from here on: {self._names([row])}: {reason}"
            tqdm.write(line if line.isprintable() else ascii(line), file=sys.stderr)
        self.rows |= found.keys()
        self.check()

    def check(self) -> None:
        """Raise UserError, with the list, if more than `data.max_bad_fraction` of the set is damaged."""
        total = len(self._shards.segments)
        if len(self.rows) > self.limit * total:
            raise UserError(
                f"{len(self.rows)} of {total} segments do not decode, more than data.max_bad_fraction = {self.limit:g}:"
                f" {self._names(self.rows)}; all are in {self.path}: see"
                " python -m simsiam_dali.pack --verify, and pack again"
            )

    def by_shard(self) -> dict[str, set[int]]:
        """`rows` under the names of their shards."""
        groups = self._shards.segments.iloc[sorted(self.rows)].groupby("shard").groups
        return {str(shard): set(rows.tolist()) for shard, rows in groups.items()}

    def holds(self, rows: Tensor) -> Tensor:
        """Which of `rows (B,)` are rows of the segment table: others were read from damaged bytes."""
        return (rows >= 0) & (rows < len(self._shards.segments))

    def _describe(self, row: int) -> tuple[str, str, str]:
        """(shard, key, the song's path) of a row."""
        segment = self._shards.segments.iloc[row]
        return segment["shard"], segment["key"], self._shards.songs["path"].iloc[segment["song"]]

    def _names(self, rows: Iterable[int]) -> str:
        """`SHARD KEY (song)` of the first rows, in one line."""
        rows = sorted(rows)
        more = f" and {len(rows) - MAX_LISTED} more" if len(rows) > MAX_LISTED else ""
        return ", ".join("{} {} ({})".format(*self._describe(row)) for row in rows[:MAX_LISTED]) + more

    def _parse(self, file: Iterable[str]) -> None:
        try:
            self._take(csv.DictReader(file))
        except (UnicodeDecodeError, csv.Error) as e:
            raise UserError(f"{self.path} is no CSV in UTF-8 any more: correct it, or move the file") from e

    def _take(self, lines: "csv.DictReader[str]") -> None:
        total = len(self._shards.segments)
        if lines.fieldnames and not {"row", "set"} <= set(lines.fieldnames):
            raise UserError(f"{self.path} has no columns row and set: correct its first line, or move the file")
        for number, line in enumerate(lines, 2):
            if line.get("set") == self._shards.fingerprint:
                if not ((line["row"] or "").isdecimal() and int(line["row"]) < total):
                    raise UserError(f"{self.path} line {number} names no segment: correct the line, or move the file")
                self.rows.add(int(line["row"]))


def _rest_of_line(path: Path) -> str:
    """What ends the last line of a file where a crash has cut it short: a quote that is open, and a line's end."""
    last = path.read_bytes().rpartition(b"\n")[2]
    return '"' * (last.count(b'"') % 2) + "\n" if last else ""
