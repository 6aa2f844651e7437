"""The songs of an embedding table, found by path or title, and limits on songs of one artist or album."""

import difflib
import os
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from simsiam_dali.common.errors import UserError, printable
from simsiam_dali.common.names import album_keys, artist_keys, name_key
from simsiam_dali.evaluation.folds import groups
from simsiam_dali.packing.find import file_of, relative_name

_LISTED = 10


class Library:
    """The songs of `table`, whose `path` is relative to `music`.

    For each song: `title` (its file's name where the tag is missing), `artist` and `album` as text; `artists` and
    `albums` as keys to compare; `recording`, the same number for two files of one recording.
    """

    def __init__(self, table: pd.DataFrame, music: Path) -> None:
        self.table, self.music = table, music
        self.path: list[str] = table["path"].tolist()
        self.title = [title or Path(path).stem for title, path in zip(table["title"], self.path, strict=True)]
        self.artist = [
            ", ".join(names) or owner for names, owner in zip(table["artists"], table["album_artist"], strict=True)
        ]
        self.album = [", ".join(names) for names in table["albums"]]
        self.artists = [artist_keys(names) for names in table["artists"]]
        owners = zip(table["albums"], table["album_artist"], table["artists"], strict=True)
        self.albums = [album_keys(*of) for of in owners]
        self.recording = groups(table, "song")
        self._row = {path: row for row, path in enumerate(self.path)}

    def __len__(self) -> int:
        return len(self.path)

    def name(self, row: int) -> str:
        """ "artist - title"."""
        return f"{self.artist[row]} - {self.title[row]}" if self.artist[row] else self.title[row]

    def file(self, row: int) -> Path:
        """Absolute path of the song, whether it is there or not."""
        return file_of(self.path[row], self.music)

    def at(self, name: str) -> list[int]:
        """Rows of the song, or of the songs of the folder, with this path relative to the music folder."""
        if name in self._row:
            return [self._row[name]]
        return [i for i, path in enumerate(self.path) if name == "." or path.startswith(f"{name}/")]

    def locate(self, text: str, option: str = "--like") -> str:
        """The path, relative to the music folder, of the song or folder that `text` names. Raises as `find` does."""
        name = self._named_path(text)
        return self.path[self.find(text, option)[0]] if name is None else name

    def find(self, text: str, option: str = "--like") -> list[int]:
        """Rows of the songs that `text` names: a file, a folder with songs, a title, or "artist - title".

        Paths are absolute, or relative to the working or the music folder. Names compare without case; part of a name
        is enough when only one recording has it. Raises UserError, which names the `option`, for a name of none, or of
        several recordings.
        """
        name = self._named_path(text)
        if name is not None:
            return self.at(name)
        key, keys = name_key(text), self._name_keys
        found = [i for i, own in enumerate(keys) if key in own] or [i for i, own in enumerate(keys) if key in own[1]]
        if key and found:
            if len(set(self.recording[found])) == 1:
                return found[:1]
            shown = _quoted(f"{self.name(i)} ({self.path[i]})" for i in found[:_LISTED])
            more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
            raise UserError(f"{option} {printable(text)} fits {len(found)} songs: {shown}{more}; give one's path")
        if os.path.lexists(text):
            raise UserError(
                f"{option} {printable(text)} is not among the {len(self)} songs embedded: add new songs to the table"
                " with python -m simsiam_dali.refresh; of equal files only one is listed"
            )
        name_of = {name: self.name(i) for i, own in enumerate(keys) for name in own}
        close = dict.fromkeys(name_of[name] for name in difflib.get_close_matches(key, name_of, n=5, cutoff=0.5))
        hint = f"the closest are {_quoted(close)}" if close else "give its path, or a part of its title"
        raise UserError(f"{option} {printable(text)}: no song of that name; {hint}")

    @cached_property
    def _name_keys(self) -> list[tuple[str, str]]:
        """Each song's title and its "artist - title", to compare."""
        return [(name_key(title), name_key(self.name(i))) for i, title in enumerate(self.title)]

    def _named_path(self, text: str) -> str | None:
        """The path, relative to the music folder, of the song or the folder with songs whose path `text` is."""
        names = [relative_name(path, self.music) for path in self._paths(text) if path.is_relative_to(self.music)]
        songs = (name for name in names if name in self._row)
        return next(songs, None) or next((name for name in names if self.at(name)), None)

    def _paths(self, text: str) -> list[Path]:
        """Paths that `text` may mean: as given, and with links resolved, since the music folder's own path has none."""
        try:
            here = Path(os.path.normpath(Path(text).absolute()))
            in_music = Path(os.path.normpath(self.music / text))
            return [here, here.parent.resolve() / here.name, here.resolve(), in_music] if text.strip() else []
        except (OSError, ValueError, RuntimeError):  # no path at all: too long, a loop, or a null character
            return []


def _quoted(texts: Iterable[str]) -> str:
    return ", ".join(f'"{printable(text)}"' for text in texts)


class Variety:
    """Accepts one song of each recording, and at most `per_artist` and `per_album` of each artist and album.

    A song counts for each of its artists and albums; unknown ones are not limited.
    """

    def __init__(self, library: Library, per_artist: int | None = None, per_album: int | None = None) -> None:
        recordings = [[int(number)] for number in library.recording]
        limits = (recordings, 1), (library.artists, per_artist), (library.albums, per_album)
        self._limits = [(keys, most, Counter[Any]()) for keys, most in limits if most is not None]

    def __call__(self, row: int) -> bool:
        """Whether the song is within the limits; if so, it is counted."""
        if any(accepted[key] >= most for keys, most, accepted in self._limits for key in keys[row]):
            return False
        for keys, _, accepted in self._limits:
            accepted.update(keys[row])
        return True
