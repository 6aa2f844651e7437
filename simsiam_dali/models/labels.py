"""What songs have in common, as tensors for the contrastive loss: the song table's artists, albums and years as ids."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
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
    """Each song's artists `(S, A)`, albums `(S, K)` and year `(S,)`, and each segment's song `(N,)`: int64.

    Ids count from 0, artists' and albums' each their own; `UNKNOWN` fills what is not known. A song's ids keep the
    order of its tags: `artists[:, 0]` is the first artist that is known.
    """

    artists: Tensor
    albums: Tensor
    years: Tensor
    segment_song: Tensor

    @classmethod
    def from_songs(cls, songs: pd.DataFrame, segment_song: np.ndarray) -> Self:
        """Labels of the song table (`artists`, `albums`, `album_artist`, `year`), for segments of these songs.

        Of a song with more than `MOST` artists or albums, those that the most songs have are kept.
        """
        artists = [artist_keys(names) for names in songs["artists"]]
        columns = zip(songs["albums"], songs["album_artist"], songs["artists"], strict=True)
        albums = [album_keys(titles, album_artist, names) for titles, album_artist, names in columns]
        years = songs["year"].astype("Int64").fillna(UNKNOWN).to_numpy("int64")
        return cls(_ids(artists), _ids(albums), torch.tensor(years), torch.tensor(segment_song, dtype=torch.int64))

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return type(self)(*(t.to(device) for t in (self.artists, self.albums, self.years, self.segment_song)))

    def of(self, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the segment table `(B,)`, on the same device, to artists `(B, A)`, albums `(B, K)`, years `(B,)`."""
        song = self.segment_song[segments]
        return self.artists[song], self.albums[song], self.years[song]


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
