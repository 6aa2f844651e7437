"""Open a shard set, local or on S3, with the checks that need no reading of tars."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from simsiam_dali.common.errors import UserError
from simsiam_dali.data import s3
from simsiam_dali.data.commit import MANIFEST
from simsiam_dali.data.format import SEGMENTS, SONGS, SPLITS, Manifest, read_manifest, read_table


@dataclass(frozen=True)
class ShardSet:
    """An opened set. Row i of `segments` is the sample whose `.row` is i; its `song` is a row of `songs`.

    `root` holds everything but the tars of a set at an `address` on S3; their indexes are in `root`.
    """

    root: Path
    manifest: Manifest
    songs: pd.DataFrame
    segments: pd.DataFrame
    address: str | None = None

    @property
    def place(self) -> Path | str:
        """The folder or address that the user gave."""
        return self.address or self.root

    @property
    def codec(self) -> str:
        """flac, wav or ogg: the extension of the audio in a sample."""
        return str(self.manifest.settings["codec"])

    @property
    def sample_rate(self) -> int | None:
        """Hz of every segment; None where each kept its song's own rate."""
        rate = self.manifest.settings["sample_rate"]
        return None if rate is None else int(rate)

    @property
    def segment_seconds(self) -> float:
        """Length of every segment in seconds."""
        return float(self.manifest.settings["segment_seconds"])

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest that changes when any file of the set does."""
        sums = {name: file.sha256 for name, file in sorted(self.manifest.files.items())}
        return hashlib.sha256(json.dumps([self.manifest.settings, sums], sort_keys=True).encode()).hexdigest()

    def names(self, split: str) -> list[str]:
        """The split's shards in order; empty where the set has no such split."""
        return [n for n in sorted(self.manifest.files) if n.startswith(split + "-") and n.endswith(".tar")]

    def tars(self, split: str) -> list[Path | str]:
        """Where each of `names(split)` is: a path, or an address on S3."""
        return [self.root / n if self.address is None else f"{self.address}/{n}" for n in self.names(split)]

    def indexes(self, split: str) -> list[Path]:
        """DALI's index of each of `tars(split)`."""
        return [(self.root / n).with_suffix(".idx") for n in self.names(split)]

    def count(self, split: str) -> int:
        """Number of segments in the split."""
        return int((self.segments["split"] == split).sum())


def open_shards(root: Path | str) -> ShardSet:
    """Open the set in `root`, a folder or an address on S3. Raises UserError if there is none, or if it has changed.

    Sizes are always compared, and each index with its tar's length and the segment table's rows; a file is hashed only
    if its modification time has changed.
    """
    if s3.is_address(root):
        return _open_remote(root)
    root = Path(root)
    manifest = read_manifest(root)
    for name, packed in manifest.files.items():
        if problem := packed.problem(root / name):
            if read_manifest(root) != manifest:  # replaced by a packer meanwhile
                return open_shards(root)
            raise UserError(f"{root / name} {problem}: pack again with python -m simsiam_dali.pack")
    return _consistent(ShardSet(root, manifest, read_table(root / SONGS), read_table(root / SEGMENTS)))


def _open_remote(address: str) -> ShardSet:
    remote = s3.Remote(address)
    if MANIFEST not in remote.sizes:
        raise UserError(f"no shards at {address}: put what python -m simsiam_dali.pack writes there")
    content = remote.read(MANIFEST)
    root = remote.folder(content)
    remote.fetch([MANIFEST], root)
    manifest = read_manifest(root)
    for name, packed in manifest.files.items():
        if remote.sizes.get(name) != packed.bytes:
            there = f"has {remote.sizes[name]} bytes, not {packed.bytes}" if name in remote.sizes else "is missing"
            raise UserError(f"{remote.address}/{name} {there}: copy the set again, with its manifest.json last")
    small = [name for name in manifest.files if not name.endswith(".tar")]
    remote.fetch(small, root)
    for name in small:
        if problem := manifest.files[name].problem(root / name):
            raise UserError(f"{remote.address}/{name}, or its copy {root / name}, {problem}")
    tables = read_table(root / SONGS), read_table(root / SEGMENTS)
    return _consistent(ShardSet(root, manifest, *tables, address=remote.address))


def _consistent(shards: ShardSet) -> ShardSet:
    if problem := next(_inconsistencies(shards), None):
        raise UserError(f"{problem}: pack again with python -m simsiam_dali.pack --replace")
    return shards


def _inconsistencies(shards: ShardSet) -> Iterator[str]:
    """Where manifest, indexes and segment table contradict each other; no tar is read."""
    rows_of = shards.segments["shard"].value_counts().to_dict()
    split_of = shards.segments.groupby("shard")["split"].unique()
    for split in SPLITS:
        for tar, index in zip(shards.names(split), shards.indexes(split), strict=True):
            rows = rows_of.pop(tar, 0)
            if index.name not in shards.manifest.files:
                yield f"{index} is missing (the index DALI needs)"
                continue
            try:
                head, *lines = index.read_text().splitlines()
                end = _tar_end(lines[-1]) if lines else -1
            except ValueError:
                head, lines, end = "", [], -1
            if head != f"v1.2 {rows}" or len(lines) != rows:
                yield f"{index} does not have the {rows} segments that {SEGMENTS} gives its tar"
            elif end != shards.manifest.files[tar].bytes:
                yield f"{index} does not fit its tar: by the index, the tar has another length"
            elif list(split_of[tar]) != [split]:
                yield f"{shards.root / SEGMENTS} gives {tar} to another split"
    if rows_of:
        yield f"{shards.root / SEGMENTS} names shards that are not in the manifest: {sorted(map(str, rows_of))}"


def _tar_end(line: str) -> int:
    """Length of the tar whose index ends with `line`: the last content, padded to a block, and two empty blocks."""
    _, offset, size, _ = line.split(" ")[-4:]
    return int(offset) + -(-int(size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE
