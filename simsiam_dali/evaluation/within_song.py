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
"""Variance that is added to each direction's, in units of the songs' own: without it, what never varies within songs
would count without bounds."""
ROUNDING = 1e-7
"""Of the largest variance: what is below is float32's rounding, and no direction."""
MAX_AXES = 1024
"""Directions that are kept; all of them, for the encoders that are trained on CPUs."""
MAX_SEGMENTS = 20_000
"""About as many segments are looked at, of songs that are evenly spread over the table."""


@dataclass(frozen=True)
class WithinSong:
    """The covariance of segments' vectors around their song's mean: `axes.T @ axes + diag(rest)`.

    axes `(K, D)` float32: directions, each as long as the standard deviation along it, the largest first. rest `(D,)`
    float32: each dimension's variance that they leave, 0 where K = D.
    """

    axes: np.ndarray
    rest: np.ndarray

    @classmethod
    def of_segments(cls, segments: np.ndarray, song: np.ndarray) -> Self | None:
        """From the vectors `(N, D)` of segments and the song `(N,)` int of each; None where no song has two."""
        from scipy.linalg import eigh  # here, so that reading a table does not wait for it

        number = np.unique(song, return_inverse=True)[1]
        every = -(-len(segments) // MAX_SEGMENTS)
        chosen = number % every == 0
        x, number = segments[chosen], number[chosen] // every
        count = np.bincount(number)
        if (count < 2).all():
            return None
        means = np.zeros((len(count), x.shape[1]))
        np.add.at(means, number, x)
        means /= count[:, None]
        # In units of what tells songs apart: else rounding would hide what the dimensions with small numbers do.
        scale = means.std(axis=0)
        scale[scale == 0] = 1
        deviation = (x - means[number]) / scale
        covariance = deviation.T @ deviation / (count - 1).sum()
        dims = len(covariance)
        variance, axes = eigh(covariance, subset_by_index=(max(0, dims - MAX_AXES), dims - 1))
        axes = (axes * np.sqrt(variance.clip(min=0))).T[::-1]
        rest = (np.diagonal(covariance) - (axes**2).sum(axis=0)).clip(min=0) if dims > MAX_AXES else np.zeros(dims)
        return cls((axes * scale).astype(np.float32), (rest * scale**2).astype(np.float32))

    def normalised(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Standardised vectors `(N, D)`, each dimension divided by `scale (D,)`, to `(N, D)` of the same dtype.

        Along each direction they are divided by the root of the variance within songs there, plus `FLOOR`.
        """
        axes = (self.axes / scale).astype(np.float64)
        # Orthogonal in the units of the table that they were made with; that one may have gained songs since.
        variance, turn = np.linalg.eigh(axes @ axes.T)
        kept = variance > ROUNDING * variance[-1]
        variance, turn = variance[kept], turn[:, kept]
        directions = axes.T @ (turn / np.sqrt(variance))
        outside = FLOOR + float(np.mean(self.rest / scale**2))
        gain = np.sqrt(outside / (variance + FLOOR)) - 1
        return x + (x @ (directions * gain).astype(x.dtype)) @ directions.T.astype(x.dtype)
