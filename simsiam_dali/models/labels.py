"""What songs have in common, as tensors for the contrastive loss: artists, albums, years and folders as ids."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from simsiam_dali.common.names import album_keys, artist_keys, known_keys
from simsiam_dali.models.losses import UNKNOWN

# Most artists and albums kept of one song. Every row of a table is as wide as the widest, and comparing two batches'
# rows takes the square of it, so one song on 200 albums would be paid for by all the others at every step.
MOST = 8


@dataclass(frozen=True)
class SongLabels:
    """Artists `(S, A)`, albums `(S, K)`, year `(S,)` and folders `(S, F)` of each song; each segment's song `(N,)`.

    All int64. Ids count from 0, those of each kind by themselves; `UNKNOWN` fills what is not known. A song's ids keep
    the order of its tags: `artists[:, 0]` is the first artist that is known.
    """

    artists: Tensor
    albums: Tensor
    years: Tensor
    folders: Tensor
    segment_song: Tensor

    @classmethod
    def from_songs(cls, songs: pd.DataFrame, segment_song: np.ndarray) -> Self:
        """Labels of the song table (its tags, `path` and `other_paths`), for segments of these songs.

        Of a song with more than `MOST` artists, albums or folders, those that the most songs have are kept.
        """
        artists = [artist_keys(names) for names in songs["artists"]]
        columns = zip(songs["albums"], songs["album_artist"], songs["artists"], strict=True)
        albums = [album_keys(titles, album_artist, names) for titles, album_artist, names in columns]
        years = songs["year"].astype("Int64").fillna(UNKNOWN).to_numpy("int64")
        copies = zip(songs["path"], songs["other_paths"], strict=True)
        folders = [folder_keys([path, *others]) for path, others in copies]
        song = torch.tensor(segment_song, dtype=torch.int64)
        return cls(_ids(artists), _ids(albums), torch.tensor(years), _ids(folders), song)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return type(self)(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def of(self, segments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows of the segment table `(B,)`, on the same device, to what the contrastive loss takes of each.

        Artists `(B, A)`, albums `(B, K)`, years `(B,)` and folders `(B, F)`.
        """
        song = self.segment_song[segments]
        return self.artists[song], self.albums[song], self.years[song], self.folders[song]


def folder_keys(paths: Iterable[str]) -> list[str]:
    """The folders that a song's files lie in, without repeats; the music folder itself holds no album, and is none."""
    folders = dict.fromkeys(str(PurePosixPath(path).parent) for path in paths)
    return [folder for folder in folders if folder != "."]


def first_label_ids(songs: pd.DataFrame, column: str) -> Tensor:
    """Each song's first `artists` or `genres` as an id, `(songs,)` int64; -1 where none is known.

    Names compare as the contrastive loss compares them: without case and placeholders, and "Various Artists" is nobody.
    """
    keys = {"artists": artist_keys, "genres": known_keys}[column]
    first = songs[column].map(lambda names: next(iter(keys(names)), None))
    return torch.from_numpy(pd.factorize(first)[0].astype("int64"))


def _ids(keys: Sequence[Sequence[Hashable]]) -> Tensor:
    """Each song's keys to rows of ids `(songs, widest)`, filled up with `UNKNOWN`; at least one column."""
    songs_with = Counter(key for song in keys for key in song)
    number = {key: i for i, key in enumerate(songs_with)}
    widest = min(MOST, max(map(len, keys), default=0))
    table = np.full((len(keys), max(1, widest)), UNKNOWN, dtype=np.int64)
    for row, song in zip(table, keys, strict=True):
        shared = set(sorted(song, key=lambda key: -songs_with[key])[:MOST])
        row[: len(shared)] = [number[key] for key in song if key in shared]
    return torch.from_numpy(table)
