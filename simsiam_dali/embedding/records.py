"""Which files an embedding table was made from: a hidden file beside it, by which a refresh knows what has changed.

A file is unchanged while its size and its modification time are, as when packing again; a song is identified by the
hash of its decoded audio, so that it is recognised under another name or with other tags.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import atomic_write, refuse_failed_write
from simsiam_dali.data import s3
from simsiam_dali.data.format import FILES, SONGS, read_manifest, read_table
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.packing.find import SongFile
from simsiam_dali.packing.pack_song import DecodeSettings
from simsiam_dali.packing.reuse import is_final

FORMAT_VERSION = 1
NO_AUDIO = "holds no audio"
_KEY = b"simsiam_dali"
_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
        pa.field("audio_hash", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("retry", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as it was when it was decoded; `path` is relative to the music folder.

    `audio_hash`: of its song, "" for a file that was refused. `reason`: of the refusal; `retry`: it may pass.
    """

    path: str
    bytes: int
    mtime_ns: int
    audio_hash: str
    reason: str = ""
    retry: bool = False

    def holds_for(self, file: SongFile) -> bool:
        """Whether the file need not be decoded again."""
        same = (self.bytes, self.mtime_ns) == (file.bytes, file.mtime_ns)
        return same and (bool(self.audio_hash) or is_final(self.reason, self.retry))


@dataclass(frozen=True)
class Records:
    """The files, by path, of the table whose provenance has the fingerprint `shards`; `settings`: how they were cut."""

    shards: str
    settings: DecodeSettings
    files: dict[str, FileRecord]

    @property
    def fingerprint(self) -> str:
        """Hex digest that changes when a file or a setting does."""
        content = [asdict(self.settings), [astuple(self.files[path]) for path in sorted(self.files)]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def records_path(table: Path) -> Path:
    """Where the records of a table are."""
    return table.with_name(f".{table.name}.files")


def of_rows(rows: Iterable[dict[str, Any]], audio_hashes: list[str]) -> dict[str, FileRecord]:
    """Records from rows of a shard set's table of files. audio_hashes: of the songs, by number."""
    return {
        row["path"]: FileRecord(
            path=row["path"],
            bytes=row["bytes"],
            mtime_ns=row["mtime_ns"],
            audio_hash="" if row["status"] == "refused" else audio_hashes[row["song"]],
            reason=row["reason"] if row["status"] == "refused" else "",
            retry=row["retry"],
        )
        for row in rows
    }


def of_shards(shards: ShardSet, fingerprint: str = "") -> Records:
    """The records of the files that a set was packed from.

    fingerprint: of the table; default: the set's own.
    """
    rows = pq.read_table(shards.root / FILES).to_pylist()
    hashes = shards.songs["audio_hash"].tolist()
    settings = DecodeSettings(**{field.name: shards.manifest.settings[field.name] for field in fields(DecodeSettings)})
    return Records(fingerprint or shards.fingerprint, settings, of_rows(rows, hashes))


def open_tables(location: Path | str) -> ShardSet:
    """A shard set's tables of songs and files, without its segments: the tars may be gone. Raises UserError."""
    address = location if isinstance(location, str) and location.startswith(s3.SCHEME) else None
    root = s3.copy_small_files(address) if address else Path(location)
    manifest = read_manifest(root)
    for name in (SONGS, FILES):
        if problem := manifest.files[name].problem(root / name, always_hash=True):
            raise UserError(f"{root / name} {problem}: pack again with python -m simsiam_dali.pack")
    return ShardSet(root, manifest, read_table(root / SONGS), pd.DataFrame(), address)


def write_records(path: Path, records: Records) -> None:
    """Write the file atomically; the same records give the same bytes. Raises UserError when it cannot be written."""
    about = {"format_version": FORMAT_VERSION, "shards": records.shards, "settings": asdict(records.settings)}
    files = [records.files[name] for name in sorted(records.files)]
    columns = [pa.array([getattr(file, f.name) for file in files], f.type) for f in _SCHEMA]
    table = pa.Table.from_arrays(columns, schema=_SCHEMA.with_metadata({_KEY: json.dumps(about).encode()}))
    with refuse_failed_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            pq.write_table(table, part)


def read_records(path: Path) -> Records | None:
    """Read what `write_records` wrote, None where there is no file. Raises UserError for one that is something else."""
    try:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[_KEY])
        if about["format_version"] != FORMAT_VERSION:
            raise ValueError(about["format_version"])
        columns = (table[name].to_pylist() for name in _SCHEMA.names)
        files = {record[0]: FileRecord(*record) for record in zip(*columns, strict=True)}
        return Records(about["shards"], DecodeSettings(**about["settings"]), files)
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException, TypeError, KeyError, ValueError) as e:
        raise UserError(f"{path} is damaged, or of another version: remove it, and refresh again") from e


def same_audio(hashes: Mapping[str, str], listed: Iterable[str]) -> dict[str, str]:
    """Files whose audio another file is listed for, by path: the path of that one.

    hashes: of the audio of all files, by path, "" for none. listed: the paths in the table.
    """
    of_hash = {hashes[path]: path for path in listed if hashes.get(path)}
    there = set(of_hash.values())
    return {path: of_hash[own] for path, own in hashes.items() if own in of_hash and path not in there}


def read_same_audio(table: Path, fingerprint: str, listed: Iterable[str]) -> dict[str, str]:
    """`same_audio` by the records of the table with this fingerprint and these paths; nothing where there are none.

    Faster than `read_records`, and what needs it also works without: damaged records are no error here.
    """
    try:
        files = pq.read_table(records_path(table), columns=["path", "audio_hash"])
        if not fingerprint or json.loads(files.schema.metadata[_KEY])["shards"] != fingerprint:
            return {}
        return same_audio(dict(zip(*(column.to_pylist() for column in files.columns), strict=True)), listed)
    except (OSError, pa.ArrowException, TypeError, KeyError, ValueError):
        return {}
