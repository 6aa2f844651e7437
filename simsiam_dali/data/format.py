"""The shard format: file names, table schemas, the manifest, and DALI's index files.

A set is a folder of `train-NNNNNN.tar` and `val-NNNNNN.tar` (WebDataset; DALI's index beside each as `.idx`),
`songs.parquet`, `segments.parquet`, `files.parquet` (every file seen at packing), `refused.csv` and `manifest.json`.
A sample is `KEY.flac` (or wav, ogg: mono, 16 bit), `KEY.row` (int64 little-endian, the row in the segment table) and
`KEY.json` (the tags, for readers of plain webdataset). KEY is the row in nine digits.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import sha256_of
from simsiam_dali.data.commit import MANIFEST, finish_commit

FORMAT_VERSION = 1
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
SONGS, SEGMENTS, FILES, REFUSED = "songs.parquet", "segments.parquet", "files.parquet", "refused.csv"

_TEXT, _TEXTS, _INT, _FLOAT = pa.string(), pa.list_(pa.string()), pa.int64(), pa.float64()


def _schema(nullable: str, **types: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, t, nullable=name == nullable) for name, t in types.items()])


SCHEMAS = {
    SONGS: _schema(
        "year",
        path=_TEXT,  # relative to the music folder
        other_paths=_TEXTS,  # files with the same audio
        title=_TEXT,
        artists=_TEXTS,
        albums=_TEXTS,
        album_artist=_TEXT,
        year=_INT,
        genres=_TEXTS,
        rating=_FLOAT,  # 0..1, NaN = unrated
        duration=_FLOAT,  # seconds that decoded
        sample_rate=_INT,  # Hz, of the source
        channels=_INT,
        audio_hash=_TEXT,
        split=_TEXT,
        note=_TEXT,  # what is wrong with the file, such as its being truncated
    ),
    SEGMENTS: _schema(
        "",
        song=_INT,
        key=_TEXT,
        split=_TEXT,
        shard=_TEXT,
        start=_FLOAT,  # seconds
        seconds=_FLOAT,  # true length, below the segment's where a short song was repeated
        sample_rate=_INT,  # Hz, as stored
    ),
    FILES: _schema(
        "song",
        path=_TEXT,
        bytes=_INT,
        mtime_ns=_INT,
        status=_TEXT,  # ok, duplicate or refused
        reason=_TEXT,  # of a refusal, else the song's note
        retry=pa.bool_(),  # refused for a reason that may pass, such as a permission
        song=_INT,
    ),
}


@dataclass(frozen=True)
class FileSum:
    """A file of the set as it was packed; `mtime_ns` only saves computing the checksum again."""

    bytes: int
    sha256: str
    mtime_ns: int

    def problem(self, path: Path, always_hash: bool = False) -> str | None:
        """How the file at `path` differs from this one, or None. It is hashed if its mtime differs, or always."""
        try:
            info = path.stat()
            if info.st_size != self.bytes:
                return f"has changed since packing ({info.st_size} bytes, was {self.bytes})"
            if (always_hash or info.st_mtime_ns != self.mtime_ns) and sha256_of(path) != self.sha256:
                return "has changed since packing (its checksum differs)"
        except FileNotFoundError:
            return "is missing (the index DALI needs)" if path.suffix == ".idx" else "is missing"
        except OSError as e:
            return f"cannot be read ({e.strerror})"
        return None


@dataclass(frozen=True)
class Manifest:
    """`music`: absolute path of the packed folder; `settings`: the packing options; `counts`: for people."""

    format_version: int
    music: str
    settings: dict[str, Any]
    counts: dict[str, int]
    files: dict[str, FileSum]


@dataclass(frozen=True)
class _RequiredSettings:
    """The settings that `ShardSet` reads, for validation."""

    codec: Literal["flac", "wav", "ogg"]
    sample_rate: int | None
    segment_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]


def read_manifest(root: Path) -> Manifest:
    """The manifest of `root`, after finishing a replacement that was interrupted. Raises UserError."""
    if not root.is_dir():
        raise UserError(f"no shards at {root}: no such folder; make them with python -m simsiam_dali.pack MUSIC_DIR")
    finish_commit(root)
    try:
        content = (root / MANIFEST).read_bytes()
        version = json.loads(content)["format_version"]
        if version == FORMAT_VERSION:
            manifest = TypeAdapter(Manifest).validate_json(content, strict=True)
            TypeAdapter(_RequiredSettings).validate_python(manifest.settings)
            leads_out = any(Path(name).name != name for name in manifest.files)
            if leads_out or not {SONGS, SEGMENTS, FILES} <= manifest.files.keys():
                raise ValueError(manifest.files.keys())
            return manifest
    except FileNotFoundError:
        raise UserError(f"no shards in {root}: make them with python -m simsiam_dali.pack MUSIC_DIR") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{root / MANIFEST} is damaged: pack again with python -m simsiam_dali.pack --replace") from e
    raise UserError(
        f"{root} holds shards of format version {version}, this program reads {FORMAT_VERSION}: "
        "pack again with python -m simsiam_dali.pack --replace"
    )


def verify(root: Path) -> list[str]:
    """The files of the set in `root` that are not what was packed, one line each; reads every file."""
    files = read_manifest(root).files
    problems = {name: packed.problem(root / name, always_hash=True) for name, packed in files.items()}
    return [f"{root / name} {problem}" for name, problem in problems.items() if problem]


def read_table(path: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a table of the set, or some columns of it.

    Lists are returned as lists, `year` and a file's `song` as Int64, since they may be <NA>.
    """
    table = pq.read_table(path, columns=None if columns is None else list(columns))
    frame = table.to_pandas()
    for column in table.schema:
        if column.type == _TEXTS:
            frame[column.name] = [list(texts) for texts in frame[column.name]]
        elif column.nullable and column.type == pa.int64():
            frame[column.name] = table[column.name].to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    return frame


Members = Mapping[str, tuple[int, int, str]]
"""A sample in a tar: extension -> (offset in bytes, size in bytes, name)."""


def row_of(members: Members) -> int:
    """The segment's row, which is its sample's key."""
    return int(members["row"][2].partition(".")[0])


def index_text(samples: Iterable[Members]) -> str:
    """DALI's index file for a tar, as its `wds2idx` writes it."""
    lines = [" ".join(f"{ext} {o} {size} {name}" for ext, (o, size, name) in s.items()) for s in samples]
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""])


def read_index(path: Path) -> list[Members]:
    """The samples of a tar, from the index beside it. Raises UserError if it is not an index."""
    samples: list[Members] = []
    try:
        head, *lines = path.read_text().splitlines()
        for line in lines:
            words = line.split(" ")
            samples.append({e: (int(o), int(s), n) for e, o, s, n in zip(*[iter(words)] * 4, strict=True)})
        if head != f"v1.2 {len(samples)}" or any(min(o, s) < 0 for of in samples for o, s, _ in of.values()):
            raise ValueError(head)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is damaged: pack again with python -m simsiam_dali.pack --replace") from e
    return samples
