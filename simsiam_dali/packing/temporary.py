"""Pack songs that are in no shard set temporarily, so that they pass through the same data graph."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from simsiam_dali.common.errors import UserError
from simsiam_dali.data.shards import ShardSet, open_shards
from simsiam_dali.packing.find import SongFile, find_songs, relative_name
from simsiam_dali.packing.pack import NothingPacked, Report, pack
from simsiam_dali.packing.pack_song import PackSettings
from simsiam_dali.packing.ratings import RatingsFile


@dataclasses.dataclass(frozen=True)
class TemporarySongs:
    """Files whose `name` is relative to `root`, the settings to pack them with, and ratings that override the tags'."""

    root: Path
    files: list[SongFile]
    settings: PackSettings
    ratings: RatingsFile | None = None

    @property
    def fingerprint(self) -> str:
        """Hex digest that changes when a file, a setting or a rating of `ratings` does, without decoding."""
        seen = [(file.name, file.bytes, file.mtime_ns) for file in self.files]
        content: list[Any] = [str(self.root), seen, dataclasses.asdict(self.settings)]
        if self.ratings is not None:
            content += sorted(self.ratings.by_path.items()), sorted(self.ratings.by_name.items())
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def packed(self, folder: Path) -> tuple[ShardSet, Report]:
        """The songs as shards in `folder`, where an interrupted packing continues; and the report."""
        workers = len(os.sched_getaffinity(0))
        try:
            report = pack(self.root, folder, self.settings, workers, self.ratings, replace=True, files=self.files)
        except NothingPacked:
            shutil.rmtree(folder)
            raise
        shards = open_shards(folder)
        return dataclasses.replace(shards, songs=shards.songs.assign(split="")), report  # in neither split


def without_parents(path: Path) -> Path:
    """A path without `..`, but with its links, unless a link before `..` makes that another place."""
    short = Path(os.path.normpath(path))
    return short if short.exists() and short.samefile(path) else path.resolve()


def find(paths: list[Path], settings: PackSettings, ratings: Path | None = None) -> TemporarySongs:
    """The songs of `paths`, folders and files; a file given by name is accepted with any suffix.

    settings: of the packing; nothing is kept for validation. ratings: a file of them, whose paths are relative to the
    folder that holds all `paths`. Raises UserError for a path that does not exist, and as `RatingsFile.read` does.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"--music {path.absolute()}: no such folder or file")
    given = [without_parents(path.absolute()) for path in paths]
    root = Path(os.path.commonpath([path if path.is_dir() else path.parent for path in given]))
    found: dict[Path, SongFile] = {}
    for path in given:
        if path.is_dir():
            found |= {file.path: file for file in find_songs(path)[0]}
        else:
            info = path.stat()
            found[path] = SongFile(path, "", info.st_size, info.st_mtime_ns)
    if not found:
        raise UserError(f"--music {' '.join(map(str, paths))}: no audio file there")
    files = [dataclasses.replace(file, name=relative_name(path, root)) for path, file in found.items()]
    rated = RatingsFile.read(ratings, root) if ratings else None
    return TemporarySongs(root, sorted(files, key=lambda file: file.name), in_one_split(settings), rated)


def in_one_split(settings: PackSettings) -> PackSettings:
    """The settings for songs of which none is kept for validation."""
    return dataclasses.replace(settings, val_fraction=0.0, split_by="song")
