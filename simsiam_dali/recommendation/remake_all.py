"""Make every saved playlist of a folder again, from a newer table."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from simsiam_dali.common.errors import UserError
from simsiam_dali.recommendation.library import Library
from simsiam_dali.recommendation.playlists import check_writable
from simsiam_dali.recommendation.saved import SUFFIXES, SavedPlaylist, follow, remake


@dataclass
class Remade:
    """A playlist made again. `files`: those whose content is another now; `unchanged`: the others.

    `added`, `removed`: number of its songs. `problem`: why it could not be made; then only its request may be in
    `files`, with the new paths of the songs that moved.
    """

    name: str
    files: dict[Path, bytes] = field(default_factory=dict)
    unchanged: list[Path] = field(default_factory=list)
    added: int = 0
    removed: int = 0
    problem: str = ""


def is_newer(playlist: SavedPlaylist, table: Path) -> bool:
    """Whether all files of the playlist are there and were written after the table, as make would decide."""
    files = [playlist.folder / f"{playlist.name}.{suffix}" for suffix in SUFFIXES]
    made = table.stat().st_mtime_ns
    return all(file.exists() and file.stat().st_mtime_ns >= made for file in files)


def remake_all(
    playlists: Iterable[SavedPlaylist], library: Library, x: np.ndarray, moved: Mapping[str, str]
) -> list[Remade]:
    """Every playlist from `library`, whose songs have the unit vectors `x (N, D)`; nothing is written.

    moved: old path -> new path of songs; requests that name one are written with its new path. A playlist whose songs
    are gone, or whose file belongs to another program, is returned with the problem.
    """
    made = []
    for old in playlists:
        playlist, result = follow(old, moved), Remade(old.name)
        made.append(result)
        if playlist != old:  # also where a song is gone: nothing else keeps where the others went
            _add(result, old.folder / f"{old.name}.json", playlist.json())
        try:
            texts = {old.folder / name: text for name, text in remake(library, x, playlist).items()}
            for path in texts:
                check_writable(path, replace=False)
        except UserError as e:
            result.problem = str(e)
            continue
        for path, text in texts.items():
            _add(result, path, text)
    return made


def _add(result: Remade, path: Path, text: str) -> None:
    """Add a file of the playlist, with its new content."""
    content = text.encode()
    before = path.read_bytes() if path.exists() else b""
    if content != before:
        result.files[path] = content
    else:
        result.unchanged.append(path)
    if path.suffix == ".m3u8":
        now, then = _songs(content), _songs(before)
        result.added, result.removed = (now - then).total(), (then - now).total()


def _songs(m3u8: bytes) -> Counter[bytes]:
    return Counter(line for line in m3u8.splitlines() if line and not line.startswith(b"#"))
