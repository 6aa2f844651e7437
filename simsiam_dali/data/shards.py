"""The shard format: what `tools/make_shards.py` writes and everything else reads.

A set is a folder of `train-NNNNNN.tar` and `val-NNNNNN.tar` (WebDataset; DALI's index beside each as `.idx`),
`songs.parquet`, `segments.parquet`, `files.parquet` (every file seen at packing), `refused.csv` and
`manifest.json`. A sample is `KEY.flac` (or wav, ogg: mono, 16 bit), `KEY.row` (int64 little-endian, the row in
the segment table) and `KEY.json` (the tags, for readers of plain webdataset). KEY is the row in nine digits.
"""

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter

from simsiam_dali.common.errors import UserError
from simsiam_dali.data import s3
from simsiam_dali.data.commit import MANIFEST, finish_commit

FORMAT_VERSION = 1
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
SONGS, SEGMENTS, FILES, REFUSED = "songs.parquet", "segments.parquet", "files.parquet", "refused.csv"

ROWS_AT_ONCE = 1 << 12
_TEXT, _TEXTS, _INT, _FLOAT = pa.string(), pa.list_(pa.string()), pa.int64(), pa.float64()


def _schema(may_be_missing: str, **types: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, t, nullable=name == may_be_missing) for name, t in types.items()])


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
        retry=pa.bool_(),  # refused for what may pass, such as a permission
        song=_INT,
    ),
}


@dataclass(frozen=True)
class FileSum:
    """A file of the set as it was packed; `mtime_ns` only saves computing the sum again."""

    bytes: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True)
class Manifest:
    """`music`: absolute path of the packed folder; `settings`: make_shards' options; `counts`: for people."""

    format_version: int
    music: str
    settings: dict[str, Any]
    counts: dict[str, int]
    files: dict[str, FileSum]


@dataclass(frozen=True)
class _Needed:
    """What `ShardSet` reads of the settings, for their check."""

    codec: Literal["flac", "wav", "ogg"]
    sample_rate: int | None
    segment_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]


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
        """What the user calls it by."""
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
    """Open the set in `root`, a folder or an address on S3. `UserError` where none is, or not as it was packed.

    Sizes are always compared, and each index with its tar's length and the segment table's rows; a file is read to
    compare its sum only if its modification time has changed.
    """
    if s3.is_address(root):
        return _open_remote(root)
    root = Path(root)
    manifest = read_manifest(root)
    for name, packed in manifest.files.items():
        if problem := changed(root / name, packed):
            if read_manifest(root) != manifest:  # replaced by a packer while we looked
                return open_shards(root)
            raise UserError(f"{root / name} {problem}: pack again with python -m simsiam_dali.pack")
    shards = ShardSet(root, manifest, read_table(root / SONGS), read_table(root / SEGMENTS))
    return _fitting(shards)


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
        if problem := changed(root / name, manifest.files[name]):
            raise UserError(f"{remote.address}/{name}, or its copy {root / name}, {problem}")
    tables = read_table(root / SONGS), read_table(root / SEGMENTS)
    return _fitting(ShardSet(root, manifest, *tables, address=remote.address))


def _fitting(shards: ShardSet) -> ShardSet:
    if problem := next(_unfit(shards), None):
        raise UserError(f"{problem}: pack again with python -m simsiam_dali.pack --replace")
    return shards


def _unfit(shards: ShardSet) -> Iterator[str]:
    """Where manifest, indexes and segment table cannot be of one set; no tar is read."""
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
                end = _end_of(lines[-1]) if lines else -1
            except ValueError:
                head, lines, end = "", [], -1
            if head != f"v1.2 {rows}" or len(lines) != rows:
                yield f"{index} does not have the {rows} segments that {SEGMENTS} gives its tar"
            elif end != shards.manifest.files[tar].bytes:
                yield f"{index} does not fit its tar: it tells of another length"
            elif list(split_of[tar]) != [split]:
                yield f"{shards.root / SEGMENTS} gives {tar} to another split"
    if rows_of:
        yield f"{shards.root / SEGMENTS} names shards that are not in the manifest: {sorted(map(str, rows_of))}"


def _end_of(line: str) -> int:
    """Where a tar ends whose index ends with `line`: the last content, filled up to a block, and two empty blocks."""
    _, offset, size, _ = line.split(" ")[-4:]
    return int(offset) + -(-int(size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE


def read_manifest(root: Path) -> Manifest:
    """The manifest of `root`, after finishing a replacement that was cut short."""
    if not root.is_dir():
        raise UserError(f"no shards at {root}: no such folder; make them with python -m simsiam_dali.pack MUSIC_DIR")
    finish_commit(root)
    try:
        content = (root / MANIFEST).read_bytes()
        version = json.loads(content)["format_version"]
        if version == FORMAT_VERSION:
            manifest = TypeAdapter(Manifest).validate_json(content, strict=True)
            TypeAdapter(_Needed).validate_python(manifest.settings)
            if not {SONGS, SEGMENTS, FILES} <= manifest.files.keys():
                raise KeyError(SONGS)
            if strangers := [name for name in manifest.files if Path(name).name != name]:
                raise ValueError(f"{strangers[0]!r} is no plain file name")  # it must not lead out of the folder
            return manifest
    except FileNotFoundError:
        raise UserError(f"no shards in {root}: make them with python -m simsiam_dali.pack MUSIC_DIR") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{root / MANIFEST} is damaged: pack again with python -m simsiam_dali.pack --replace") from e
    raise UserError(
        f"{root} holds shards of format version {version}, this program reads {FORMAT_VERSION}: "
        "pack again with python -m simsiam_dali.pack --replace"
    )


def changed(path: Path, packed: FileSum, always_sum: bool = False) -> str | None:
    """What is wrong with a file of the set, or None."""
    try:
        info = path.stat()
        if info.st_size != packed.bytes:
            return f"has changed since packing ({info.st_size} bytes, was {packed.bytes})"
        if (always_sum or info.st_mtime_ns != packed.mtime_ns) and sha256_of(path) != packed.sha256:
            return "has changed since packing (its checksum differs)"
    except FileNotFoundError:
        return "is missing (the index DALI needs)" if path.suffix == ".idx" else "is missing"
    except OSError as e:
        return f"cannot be read ({e.strerror})"
    return None


def verify(root: Path) -> list[str]:
    """Check every sum, and that indexes, tars and tables tell the same; one line for each problem."""
    root = Path(root)
    manifest = read_manifest(root)
    problems = [
        f"{root / name} {problem}"
        for name, packed in manifest.files.items()
        if (problem := changed(root / name, packed, always_sum=True))
    ]
    if problems:
        return problems
    shards = ShardSet(root, manifest, read_table(root / SONGS), read_table(root / SEGMENTS))
    for split in SPLITS:
        for name in shards.names(split):
            problems += _contradictions(root / name, shards.segments.index[shards.segments["shard"] == name])
    if strangers := set(shards.segments["shard"]) - manifest.files.keys():
        problems.append(f"{root / SEGMENTS} names shards that are not in the manifest: {sorted(strangers)}")
    return problems


def _contradictions(tar: Path, rows: Iterable[int]) -> list[str]:
    """Where a sound tar, its index and the rows that the segment table gives it do not tell the same."""
    try:
        members = _members(tar)
    except (UserError, tarfile.TarError) as e:
        return [f"{tar}: {e}"]
    if index_text(members) != tar.with_suffix(".idx").read_text():
        return [f"{tar.with_suffix('.idx')} does not match its tar"]
    with tar.open("rb") as file:
        found = []
        for sample in members:
            offset, size, name = sample["row"]
            file.seek(offset)
            found.append((name, int.from_bytes(file.read(size), "little")))
    if found != [(f"{row:09d}.row", row) for row in rows]:
        return [f"{tar} does not hold the rows that {SEGMENTS} gives it"]
    return []


Members = Mapping[str, tuple[int, int, str]]  # extension -> offset, bytes, name


def index_text(samples: Iterable[Members]) -> str:
    """DALI's index file for a tar, as its `wds2idx` writes it."""
    lines = [" ".join(f"{ext} {o} {size} {name}" for ext, (o, size, name) in s.items()) for s in samples]
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""])


def read_index(path: Path) -> list[Members]:
    """The samples of a tar, from the index beside it. Raises UserError for what is no index."""
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


def _members(tar: Path) -> list[Members]:
    """The samples of a tar. Raises UserError for a member that no sample has: a link, a folder, a path."""
    samples: dict[str, dict[str, tuple[int, int, str]]] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            if not member.isreg() or Path(member.name).name != member.name:
                raise UserError(f"it holds {member.name!r}, which is no plain file")
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = (member.offset_data, member.size, member.name)
    return list(samples.values())


def write_shard(tar: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> dict[str, FileSum]:
    """Write `(key, extension -> content)` samples as a USTAR file without times or owners, and its index."""
    members = []
    digest = hashlib.sha256()
    with tar.open("wb") as file:

        def put(content: bytes) -> None:
            file.write(content)
            digest.update(content)

        for key, parts in samples:
            places = {}
            for extension, content in parts.items():
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(content)
                put(header.tobuf(tarfile.USTAR_FORMAT))
                places[extension] = (file.tell(), len(content), header.name)
                put(content + bytes(-len(content) % tarfile.BLOCKSIZE))
            members.append(places)
        put(bytes(2 * tarfile.BLOCKSIZE))
        _sync(file)
    index = tar.with_suffix(".idx")
    return {
        tar.name: FileSum(tar.stat().st_size, digest.hexdigest(), tar.stat().st_mtime_ns),
        index.name: write_file(index, index_text(members).encode()),
    }


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> FileSum:
    """Write a table of the set, `ROWS_AT_ONCE` in memory at a time; its file name chooses the schema."""
    schema, waiting = SCHEMAS[path.name], iter(rows)
    with path.open("wb") as file:
        with pq.ParquetWriter(file, schema) as writer:
            while part := list(itertools.islice(waiting, ROWS_AT_ONCE)):
                writer.write_table(pa.Table.from_pylist(part, schema))
        _sync(file)
    info = path.stat()
    return FileSum(info.st_size, sha256_of(path), info.st_mtime_ns)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a table of the set, or some columns of it.

    Lists come as lists, `year` and a file's `song` as Int64, since they may be <NA>.
    """
    table = pq.read_table(path, columns=None if columns is None else list(columns))
    frame = table.to_pandas()
    for column in table.schema:
        if column.type == _TEXTS:
            frame[column.name] = [list(texts) for texts in frame[column.name]]
        elif column.nullable and column.type == pa.int64():
            frame[column.name] = table[column.name].to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    return frame


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a staged set."""
    write_file(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode() + b"\n")


def write_file(path: Path, content: bytes) -> FileSum:
    """Write `content` through to the disk."""
    with path.open("wb") as file:
        file.write(content)
        _sync(file)
    return FileSum(len(content), hashlib.sha256(content).hexdigest(), path.stat().st_mtime_ns)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
