"""The songs of an embedding table, found by path or title, and limits on songs of one artist or album."""

import difflib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from simsiam_dali.common.errors import UserError, printable
from simsiam_dali.common.names import album_keys, artist_keys, name_key
from simsiam_dali.evaluation.folds import groups
from simsiam_dali.packing.find import file_of, relative_name
from simsiam_dali.packing.tags import read_tags

_LISTED = 10


class Library:
    """The songs of `table`, whose `path` is relative to `music`.

    same_audio: files that have no row, since a song's file has their audio, by path: the path of that file.
    For each song: `title` (its file's name where the tag is missing), `artist` and `album` as text; `artists` and
    `albums` as keys to compare; `recording`, the same number for two files of one recording.
    """

    def __init__(self, table: pd.DataFrame, music: Path, same_audio: Mapping[str, str] | None = None) -> None:
        self.table, self.music, self._same_audio = table, music, same_audio or {}
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
        self._row |= {path: self._row[of] for path, of in self._same_audio.items()}

    def __len__(self) -> int:
        return len(self.path)

    def name(self, row: int) -> str:
        """ "artist - title"."""
        return _full_name(self.artist[row], self.title[row])

    def file(self, row: int) -> Path:
        """Absolute path of the song, whether it is there or not."""
        return file_of(self.path[row], self.music)

    def at(self, name: str) -> list[int]:
        """Rows of the song, or of the songs of the folder, with this path relative to the music folder."""
        if name in self._row:
            return [self._row[name]]
        return sorted({row for path, row in self._row.items() if _is_in(path, name)})

    def locate(self, text: str, option: str = "--like") -> str:
        """The path, relative to the music folder, of the song or folder that `text` names. Raises as `find` does."""
        name = self._named_path(text)
        is_folder = name is not None and name not in self._row
        return str(name) if is_folder else self.path[self.find(text, option)[0]]

    def find(self, text: str, option: str = "--like") -> list[int]:
        """Rows of the songs that `text` names: a file, a folder with songs, a title, or "artist - title".

        Paths are absolute, or relative to the working or the music folder. Names compare without case; part of a name
        is enough when only one recording has it. A file without a row means the song with its audio. Raises UserError,
        which names the `option`, for a name of none, or of several recordings.
        """
        name = self._named_path(text)
        return [self._match(text, option)[0]] if name is None else self.at(name)

    def note(self, text: str, option: str = "--like") -> str:
        """Which files that `text` names have no row, and which song is meant; "" for none. Raises as `find` does."""
        name = self._named_path(text)
        if name is not None and name not in self._row:
            own = {row for row, path in enumerate(self.path) if _is_in(path, name)}
            files = [path for path in self._same_audio if _is_in(path, name) and self._row[path] not in own]
        else:
            file = self._match(text, option)[1] if name is None else name
            files = [file] if file in self._same_audio else []
        if len(files) > 1:
            return f"{len(files)} files in {text} have the same audio as files elsewhere, which stand for both"
        return "".join(
            f"{file} has the same audio as {self._same_audio[file]}, which stands for both" for file in files
        )

    def _match(self, text: str, option: str) -> tuple[int, str]:
        """The row of the one recording that has the name `text`, and its file. Raises as `find` does."""
        key, keys = name_key(text), self._name_keys
        found = [(i, self.path[i]) for i in _having(key, keys)]
        is_file = os.path.lexists(text)
        if key and not found and not is_file:  # only now: to read the tags of thousands of files takes seconds
            files = list(self._same_audio)
            found = [(self._row[files[i]], files[i]) for i in _having(key, self._other_name_keys)]
        if key and found:
            if len({self.recording[row] for row, _ in found}) == 1:
                return found[0]
            shown = _quoted(f"{self.name(row)} ({file})" for row, file in found[:_LISTED])
            more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
            raise UserError(f"{option} {printable(text)} fits {len(found)} songs: {shown}{more}; give one's path")
        if is_file:
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

    @cached_property
    def _other_name_keys(self) -> list[tuple[str, str]]:
        """As `_name_keys`, of the files without a row: their own tags, as far as they are there."""
        keys = []
        for path in self._same_audio:
            tags = read_tags(file_of(path, self.music))
            title, artist = tags.title or Path(path).stem, ", ".join(tags.artists) or tags.album_artist
            keys.append((name_key(title), name_key(_full_name(artist, title))))
        return keys

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


def _full_name(artist: str, title: str) -> str:
    return f"{artist} - {title}" if artist else title


def _is_in(path: str, folder: str) -> bool:
    return folder == "." or path.startswith(f"{folder}/")


def _having(key: str, keys: list[tuple[str, str]]) -> list[int]:
    """Which of `keys` are `key`, or else contain it."""
    return [i for i, own in enumerate(keys) if key in own] or [i for i, own in enumerate(keys) if key in own[1]]


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
