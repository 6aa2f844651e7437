"""Radio: songs around one song, in a random order that drifts slowly through the library."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

NEAREST = 16
"""Each song is drawn from so many of those nearest to the current position."""

TEMPERATURE = 0.1
"""A song is drawn with a probability proportional to exp(cosine / temperature)."""

DRIFT = 0.1
"""Weight of the last song in the position, a moving average over about the last 1 / DRIFT songs."""

ARTIST_GAP = 5
"""An artist is not drawn again within so many songs, unless no song of another artist is left."""


def radio(
    x: np.ndarray, start: int, seed: int, allowed: np.ndarray, recording: np.ndarray, artists: Sequence[Sequence[str]]
) -> Iterator[int]:
    """Yield rows, `start` first, until no allowed song is left; the same seed gives the same sequence.

    The next song is drawn from the nearest ones to a moving average of the songs so far: the sequence stays around its
    start, and moves on when it has played what is there. A position that stayed at the start would later jump between
    songs that lie around it on all sides.

    x: unit vectors `(N, D)` float32. allowed: bool `(N,)`, which songs may follow `start`. recording `(N,)` int: of
    songs with one number only one is yielded. artists: keys of each song's artists, as `Library.artists`; a song
    without any is not limited by them. A song costs one product of `x` with a vector.
    """
    rng = np.random.default_rng(seed)
    rows_of = defaultdict(list)
    for row, names in enumerate(artists):
        for name in names:
            rows_of[name].append(row)
    left = allowed & (recording != recording[start])
    heard = np.full(len(x), -ARTIST_GAP - 1)  # when a song of one of its artists was yielded last
    position, row, time = x[start], start, 0
    while True:
        yield row
        left &= recording != recording[row]
        for name in artists[row]:
            heard[rows_of[name]] = time
        time += 1
        free = left & (time - heard > ARTIST_GAP)
        if not free.any():
            if not left.any():
                return
            free = left & (heard == heard[left].min())  # the artists not heard for the longest time
        cosine = np.where(free, x @ position, -np.inf)
        near = np.argpartition(-cosine, min(NEAREST, len(x)) - 1)[:NEAREST]
        near = near[free[near]]
        weight = np.exp((cosine[near] - cosine[near].max()).astype(np.float64) / TEMPERATURE)
        row = int(rng.choice(near, p=weight / weight.sum()))
        position = (1 - DRIFT) * position + DRIFT * x[row]
        position /= max(float(np.linalg.norm(position)), 1e-9)
