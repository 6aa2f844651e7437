"""Open a shard set, local or on S3, whole or in part."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from simsiam_dali.common.errors import UserError
from simsiam_dali.data import s3
from simsiam_dali.data.format import (
    SEGMENTS,
    SONGS,
    Manifest,
    index_text,
    read_index,
    read_manifest,
    read_table,
    row_of,
)


@dataclass(frozen=True)
class ShardSet:
    """An opened set. Row i of `segments` is the sample whose `.row` is i; its `song` is a row of `songs`.

    `root` holds everything but the tars of a set at an `address` on S3; their indexes are in `root`. Of a part of the
    set (`subset_of`), the tables are whole; `rows` are its segments, and `index_folder` has its indexes.
    """

    root: Path
    manifest: Manifest
    songs: pd.DataFrame
    segments: pd.DataFrame
    address: str | None = None
    rows: np.ndarray | None = None
    index_folder: Path | None = None

    @property
    def location(self) -> Path | str:
        """The folder or address that the user gave."""
        return self.address or self.root

    @property
    def codec(self) -> str:
        """flac, wav or ogg: the extension of the audio in a sample."""
        return str(self.manifest.settings["codec"])

    @property
    def sample_rate(self) -> int | None:
        """Hz of every segment; None where each kept its song's own rate."""
        rate: int | None = self.manifest.settings["sample_rate"]
        return rate

    @property
    def segment_seconds(self) -> float:
        """Length of every segment in seconds."""
        return float(self.manifest.settings["segment_seconds"])

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest that changes when any file of the set does."""
        sums = {name: file.sha256 for name, file in sorted(self.manifest.files.items())}
        return hashlib.sha256(json.dumps([self.manifest.settings, sums], sort_keys=True).encode()).hexdigest()

    def tars(self, split: str) -> list[Path | str]:
        """The split's tars in order, paths or addresses on S3; empty where the set has no such split."""
        return [self.root / n if self.address is None else f"{self.address}/{n}" for n in self._names(split)]

    def indexes(self, split: str) -> list[Path]:
        """DALI's index of each of `tars(split)`."""
        return [((self.index_folder or self.root) / n).with_suffix(".idx") for n in self._names(split)]

    def count(self, split: str) -> int:
        """Number of segments in the split."""
        return len(self._segments(split))

    def _names(self, split: str) -> list[str]:
        return sorted(self._segments(split)["shard"].unique())

    def _segments(self, split: str) -> pd.DataFrame:
        chosen = self.segments if self.rows is None else self.segments.iloc[self.rows]
        return chosen[chosen["split"] == split]


def open_shards(location: Path | str) -> ShardSet:
    """Open the set in a folder or at an address on S3. Raises UserError if there is none, or if it has changed.

    The size of each file is compared, and the checksum of tables and indexes; a tar is hashed only if its modification
    time has changed, and never on S3.
    """
    address = location.rstrip("/") if isinstance(location, str) and location.startswith(s3.SCHEME) else None
    root = s3.copy_small_files(address) if address else Path(location)
    manifest = read_manifest(root)
    for name, packed in manifest.files.items():
        is_tar = name.endswith(".tar")
        if address and is_tar:
            continue
        if problem := packed.problem(root / name, always_hash=not is_tar):
            if read_manifest(root) != manifest:  # replaced by a packer meanwhile
                return open_shards(location)
            if address:
                raise UserError(f"{address}/{name}, or its copy {root / name}, {problem}")
            raise UserError(f"{root / name} {problem}: pack again with python -m simsiam_dali.pack")
    return ShardSet(root, manifest, read_table(root / SONGS), read_table(root / SEGMENTS), address)


def subset_of(shards: ShardSet, rows: np.ndarray, folder: Path) -> ShardSet:
    """The segments `rows (n,)` of a set, in the same tars; their indexes are written to `folder` and needed there."""
    for shard, own in shards.segments.iloc[rows].groupby("shard").groups.items():
        index, wanted = (shards.root / str(shard)).with_suffix(".idx"), set(own)
        (folder / index.name).write_text(index_text(m for m in read_index(index) if row_of(m) in wanted))
    return dataclasses.replace(shards, rows=rows, index_folder=folder)
