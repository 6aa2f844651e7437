"""Verify a shard set completely: every checksum, and that tars, indexes and tables agree."""

import tarfile
from collections.abc import Iterable
from pathlib import Path

from simsiam_dali.common.errors import UserError
from simsiam_dali.data.format import SEGMENTS, SONGS, SPLITS, Members, index_text, read_manifest, read_table
from simsiam_dali.data.shards import ShardSet


def verify(root: Path) -> list[str]:
    """All problems of the set in `root`, one line each; reads every file."""
    manifest = read_manifest(root)
    problems = [
        f"{root / name} {problem}"
        for name, packed in manifest.files.items()
        if (problem := packed.problem(root / name, always_hash=True))
    ]
    if problems:
        return problems
    shards = ShardSet(root, manifest, read_table(root / SONGS), read_table(root / SEGMENTS))
    for split in SPLITS:
        for name in shards.names(split):
            problems += _contradictions(root / name, shards.segments.index[shards.segments["shard"] == name])
    if unknown := set(shards.segments["shard"]) - manifest.files.keys():
        problems.append(f"{root / SEGMENTS} names shards that are not in the manifest: {sorted(unknown)}")
    return problems


def _contradictions(tar: Path, rows: Iterable[int]) -> list[str]:
    """Where an intact tar, its index and the `rows` of the segment table contradict each other."""
    try:
        members = _read_members(tar)
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


def _read_members(tar: Path) -> list[Members]:
    """The samples of a tar. Raises UserError for a member that no sample has: a link, a folder, a path."""
    samples: dict[str, dict[str, tuple[int, int, str]]] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            if not member.isreg() or Path(member.name).name != member.name:
                raise UserError(f"it holds {member.name!r}, which is no plain file")
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = (member.offset_data, member.size, member.name)
    return list(samples.values())
