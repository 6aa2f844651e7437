"""Write the files of a staged shard set, each synced to the disk."""

import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simsiam_dali.common.files import sha256_of
from simsiam_dali.data.commit import MANIFEST
from simsiam_dali.data.format import SCHEMAS, FileSum, Manifest, index_text

ROWS_IN_MEMORY = 1 << 12
"""Rows of a table that are read or written at a time."""


def write_shard(tar: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> dict[str, FileSum]:
    """Write `(key, extension -> content)` samples as a USTAR file without times or owners, and its index."""
    members = []
    with tar.open("wb") as file:
        for key, parts in samples:
            sample = {}
            for extension, content in parts.items():
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(content)
                file.write(header.tobuf(tarfile.USTAR_FORMAT))
                sample[extension] = (file.tell(), len(content), header.name)
                file.write(content + bytes(-len(content) % tarfile.BLOCKSIZE))
            members.append(sample)
        file.write(bytes(2 * tarfile.BLOCKSIZE))
    index = tar.with_suffix(".idx")
    return {tar.name: _synced(tar), index.name: write_file(index, index_text(members).encode())}


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> FileSum:
    """Write a table of the set; its file name selects the schema."""
    schema, remaining = SCHEMAS[path.name], iter(rows)
    with path.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
        while part := list(itertools.islice(remaining, ROWS_IN_MEMORY)):
            writer.write_table(pa.Table.from_pylist(part, schema))
    return _synced(path)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a staged set."""
    write_file(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode() + b"\n")


def write_file(path: Path, content: bytes) -> FileSum:
    """Write `content` and sync it to the disk."""
    path.write_bytes(content)
    return _synced(path)


def _synced(path: Path) -> FileSum:
    """Sync a file to the disk, and sum it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    info = path.stat()
    return FileSum(info.st_size, sha256_of(path), info.st_mtime_ns)
