"""What varies within songs, and distances that count it less: within-class covariance normalisation of song vectors.

Two places of a song differ in what says little about which song it is, such as its loudness; so do two songs. Where the
segments of one song spread far, two songs' vectors have to lie farther apart to mean something. It is the normalisation
of Hatch, Kajarekar and Stolcke ("Within-class covariance normalization for SVM-based speaker recognition", Interspeech
2006), with songs for speakers, so that no tag is needed. What it gains is measured in docs/experiments.md.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

FLOOR = 0.05
"""Variance added along every direction, in units of the standardised song vectors': bounds the weight of directions in
which segments of a song do not differ."""
ROUNDING = 1e-7
"""Directions with less than this fraction of the largest variance are rounding errors of float32, and dropped."""
MAX_NUMBERS = 2**23
"""The most numbers that the stored axes `(K, D)` have, 32 MB: all directions of up to 2,896 dimensions."""
MAX_SEGMENTS = 20_000
"""Segments that are used, about; of more, those of every n-th song."""


@dataclass(frozen=True)
class WithinSong:
    """The covariance of segments' vectors around their song's mean: `axes.T @ axes + diag(rest)`.

    axes `(K, D)` float32: directions, each as long as the standard deviation along it, the largest first. rest `(D,)`
    float32: each dimension's variance that they leave, 0 where K = D. freedom: the degrees of freedom that it was
    estimated from, for each song the number of its segments less one.
    """

    axes: np.ndarray
    rest: np.ndarray
    freedom: int

    @classmethod
    def of_segments(cls, segments: np.ndarray, song: np.ndarray) -> Self | None:
        """From the vectors `(N, D)` of segments and the song `(N,)` int of each; None where no song has two."""
        _, number, count = np.unique(song, return_inverse=True, return_counts=True)
        several = np.flatnonzero(count > 1)
        if not len(several):
            return None
        taken = several[:: -(-int(count[several].sum()) // MAX_SEGMENTS)]
        rows = np.isin(number, taken)
        x, number, count = segments[rows], np.searchsorted(taken, number[rows]), count[taken]
        means = np.zeros((len(taken), x.shape[1]))
        np.add.at(means, number, x)
        means /= count[:, None]
        freedom = int((count - 1).sum())
        return cls._of((x - means[number]) / freedom**0.5, 0.0, means.std(axis=0), freedom)

    @classmethod
    def _of(cls, rows: np.ndarray, rest: np.ndarray | float, scale: np.ndarray, freedom: int) -> Self:
        """The covariance `rows.T @ rows + diag(rest)`; scale `(D,)`: what each dimension is measured in."""
        # In units of what tells songs apart: else rounding would hide what the dimensions with small numbers do.
        scale = np.where(scale > 0, scale, 1)
        rows = rows / scale
        dims = rows.shape[1]
        most = min(dims, max(1, MAX_NUMBERS // dims))
        axes = _principal(rows, min(most, freedom))
        left = (rows**2).sum(axis=0) + rest / scale**2 - (axes**2).sum(axis=0)
        left = left.clip(min=0) if len(axes) < dims else np.zeros(dims)
        return cls((axes * scale).astype(np.float32), (left * scale**2).astype(np.float32), freedom)

    def pooled(self, other: Self, scale: np.ndarray) -> Self:
        """The covariance of both, each weighing as much as it was estimated from.

        scale `(D,)`: the standard deviation of the songs' vectors.
        """
        freedom = self.freedom + other.freedom
        shares = [own.freedom / freedom for own in (self, other)]
        rows = np.vstack([share**0.5 * own.axes for share, own in zip(shares, (self, other), strict=True)])
        return self._of(rows, shares[0] * self.rest + shares[1] * other.rest, scale, freedom)

    def normalised(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Standardised vectors `(N, D)`, each dimension divided by `scale (D,)`, to `(N, D)` of the same dtype.

        Along each direction they are divided by the root of the variance within songs there, plus `FLOOR`. What the
        axes leave counts as the same in all other directions.
        """
        axes = (self.axes / scale).astype(np.float64)
        # Orthogonal in the units of the table that they were made with; that one may have gained songs since.
        variance, turn = np.linalg.eigh(axes @ axes.T)
        kept = variance > ROUNDING * variance[-1]
        variance, turn = variance[kept], turn[:, kept]
        directions = axes.T @ (turn / np.sqrt(variance))
        outside = FLOOR + float(np.sum(self.rest / scale**2)) / max(1, x.shape[1] - len(variance))
        gain = np.sqrt(outside / (variance + FLOOR)) - 1
        return x + (x @ (directions * gain).astype(x.dtype)) @ directions.T.astype(x.dtype)


def _principal(rows: np.ndarray, most: int) -> np.ndarray:
    """Axes `(K, D)`, at most so many and the longest first, whose `axes.T @ axes` is nearest to rows' `(M, D)`."""
    from scipy.linalg import eigh  # here, so that reading a table does not wait for it

    count, dims = rows.shape
    least = min(count, dims)
    largest = (max(0, least - most), least - 1)
    if count < dims:
        return (eigh(rows @ rows.T, subset_by_index=largest)[1].T @ rows)[::-1]
    variance, axes = eigh(rows.T @ rows, subset_by_index=largest)
    return (axes * np.sqrt(variance.clip(min=0))).T[::-1]
