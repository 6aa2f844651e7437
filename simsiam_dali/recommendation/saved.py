"""Playlists that remember their request, so that they can be made anew from a newer embedding table.

A saved playlist is three files of one name: `NAME.json`, the request, from which `NAME.m3u8` and `NAME.xspf` are made.
The same table and request give the same bytes.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter, ValidationError

from simsiam_dali.common.errors import UserError, one_line, printable
from simsiam_dali.common.files import atomic_write, refuse_failed_write
from simsiam_dali.recommendation.choose import Choice, Request, choose
from simsiam_dali.recommendation.library import Library
from simsiam_dali.recommendation.playlists import FORMATS, MARK, check_writable, playlist_entries

VERSION = 1
SUFFIXES = ("m3u8", "xspf")
_REQUEST = TypeAdapter(Request)
_LONGEST_NAME = 200  # bytes: a file name has at most 255, with the suffix and what a temporary file's name adds


@dataclass(frozen=True)
class SavedPlaylist:
    """What `NAME.json` in `folder` holds.

    request: songs are named by their paths relative to the music folder. relative_to, prefix: where the playlist's
    paths start, as in `playlists.playlist_entries`; where both are None they are relative to `folder` itself. table:
    the embeddings that chose the songs, relative to `folder`; None where the request lists them.
    """

    folder: Path
    name: str
    request: Request
    relative_to: str | None = None
    prefix: str | None = None
    table: str | None = None

    def is_of(self, table: Path) -> bool:
        """Whether the playlist is remade from `table`: unless another table chose its songs, and still exists."""
        own = self.table_path()
        return own is None or not own.exists() or own == table.resolve()

    def table_path(self) -> Path | None:
        """`table` as an absolute path."""
        return None if self.table is None else (self.folder / self.table).resolve()

    def json(self) -> str:
        """The text of `NAME.json`."""
        request = dataclasses.asdict(self.request)
        paths = {"relative_to": self.relative_to, "prefix": self.prefix}
        document = {"made_by": MARK, "version": VERSION, "table": self.table, "request": request, "paths": paths}
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


class Written(NamedTuple):
    """The files that `save` wrote, and the songs' paths that M3U8 cannot hold, which XSPF has."""

    files: list[Path]
    left_out: list[str]


def save(
    folder: Path,
    name: str,
    request: Request,
    library: Library,
    x: np.ndarray,
    *,
    table: Path | None = None,
    relative_to: Path | None = None,
    prefix: str | None = None,
    replace: bool = False,
) -> Written:
    """Write `NAME.json`, `NAME.m3u8` and `NAME.xspf` into `folder`, which is made where there is none.

    x: unit vectors `(N, D)` of the songs. table: the file that they are from, by which `refresh` knows which playlists
    to make again. relative_to, prefix: as in `playlists.playlist_entries`, but without both the paths are relative to
    `folder`. Raises UserError, and changes nothing, for a name that is no file name, for a
    request that chooses nothing, and, unless `replace`, where a file of that name is not of this program or remembers
    another request.
    """
    check_name(name)
    base = None if relative_to is None else str(relative_to.resolve())
    origin = None if table is None or request.songs else os.path.relpath(table.resolve(), folder.resolve())
    saved = SavedPlaylist(folder, name, portable(request, library), base, prefix, origin)
    texts, left_out = _texts(library, x, saved)
    files = {folder / f"{name}.json": saved.json()} | {folder / file: text for file, text in texts.items()}
    for path, text in files.items():
        check_writable(path, replace)
        if path.suffix == ".json" and path.exists() and path.read_text(encoding="utf-8") != text and not replace:
            raise UserError(f"{path} remembers another playlist: choose another name, or give --replace")
    with refuse_failed_write(folder / name, "choose another folder or name"), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        # All are written before the first is moved in place. The request is moved first, as the last one entered: the
        # playlists can be made from it.
        for path, text in reversed(files.items()):
            stack.enter_context(atomic_write(path)).write_text(text, encoding="utf-8", newline="")
    return Written(list(files), left_out)


def check_name(name: str) -> None:
    """Raise UserError for a playlist's name that is no plain file name."""
    if not name or name[0] in ". " or "/" in name or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        raise UserError(f"--save {printable(name)[:80]!r}: a name is a file name without folder and suffix")


def portable(request: Request, library: Library) -> Request:
    """The request with each song, or folder of songs, by its path relative to the music folder."""
    return _renamed(request, library.locate)


def read_saved(folder: Path) -> list[SavedPlaylist]:
    """The saved playlists of a folder, sorted by name; none where there is no folder.

    JSON files of other programs are ignored. Raises UserError for one of ours that is damaged, or too new.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as e:
            raise UserError(f"{path} cannot be read ({e.strerror})") from e
        if f'"{MARK}"' not in text:
            continue
        try:
            document = json.loads(text)
            if document["version"] != VERSION:
                raise UserError(f"{path} has version {document['version']}, this program reads {VERSION}: save it anew")
            request = _REQUEST.validate_python(document["request"])
            paths, table = document["paths"], document.get("table")  # None: of an earlier version
            found.append(SavedPlaylist(folder, path.stem, request, **paths, table=table))
        except (ValueError, KeyError, TypeError, ValidationError) as e:
            raise UserError(f"{path} is damaged ({one_line(e)}): save the playlist anew, or remove it") from e
    return found


def remake(library: Library, x: np.ndarray, saved: SavedPlaylist) -> dict[str, str]:
    """The playlist's files from this library: file name -> text. Nothing is written, and `NAME.json` stays as it is.

    x: unit vectors `(N, D)` of the songs. Raises UserError, which names the playlist, where a song of the request is
    not in the library any more, or nothing is left to choose.
    """
    return _texts(library, x, saved)[0]


def chosen(library: Library, x: np.ndarray, saved: SavedPlaylist) -> Choice:
    """The playlist's songs, as its request chooses them from this library; raises as `remake` does."""
    try:
        return choose(library, x, _absolute(saved.request, library))
    except UserError as e:
        raise UserError(f"playlist {printable(saved.name)}: {e}") from e


def _texts(library: Library, x: np.ndarray, saved: SavedPlaylist) -> tuple[dict[str, str], list[str]]:
    """`remake`, and the paths that M3U8 cannot hold."""
    choice = chosen(library, x, saved)
    relative_to = Path(saved.relative_to) if saved.relative_to else saved.folder
    entries = playlist_entries(library, choice, relative_to, saved.prefix)
    made = {suffix: FORMATS[suffix](entries, saved.name) for suffix in SUFFIXES}
    return {f"{saved.name}.{suffix}": text for suffix, (text, _) in made.items()}, made["m3u8"][1]


def _absolute(request: Request, library: Library) -> Request:
    """A portable request with absolute paths, whose meaning depends neither on the working folder nor on titles."""

    def absolute(name: str, _option: str) -> str:
        if not library.at(name):
            raise UserError(f"{printable(name)} is not in the library any more")
        return str(library.music / name)

    return _renamed(request, absolute)


def _renamed(request: Request, rename: Callable[[str, str], str]) -> Request:
    """The request with each song's name replaced by `rename(name, option)`."""
    renamed: dict[str, Any] = {
        field: [rename(name, option) for name in names]
        for field, option in (("like", "--like"), ("unlike", "--unlike"), ("path", "--path"), ("songs", "song"))
        if (names := getattr(request, field))
    }
    if request.radio:
        renamed["radio"] = rename(request.radio, "--radio")
    return dataclasses.replace(request, **renamed)


def follow(saved: SavedPlaylist, moved: Mapping[str, str]) -> SavedPlaylist:
    """The playlist with the songs of its request that have moved under their new paths. moved: old path -> new path."""
    return dataclasses.replace(saved, request=_renamed(saved.request, lambda name, _: moved.get(name, name)))
