"""What the owner may think of songs not rated yet: Bayesian ridge regression from vectors to ratings.

A linear model, since it is what a few dozen ratings can carry, and ridge is the probe that `evaluate` measures. Its
Bayesian form (MacKay 1992, doi:10.1162/neco.1992.4.3.415) finds the strength of the prior and the noise of the ratings
from the ratings alone, without held-out songs, and gives each prediction a variance: the noise, plus what the rated
songs leave open about this song. That second part is large for a song unlike all rated ones, and shrinks around each
song that gets a rating. The vectors have length 1, so no song is uncertain only because its vector is long.
"""

from collections.abc import Callable

import numpy as np
from sklearn.linear_model import BayesianRidge

MIN_RATED = 10
NOISE = 0.1
"""Prior guess of how far an owner's rating lies from what the same owner says another day: half a star of five.

It weighs as much as two songs; without it the first few ratings are taken for exact.
"""
_BLOCK = 4096


class Taste:
    """Ratings `y (R,)` in 0..1 of the songs with unit vectors `x (R, D)`; at least two of them differ."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self._mean = x.mean(axis=0, dtype=np.float64)
        model = BayesianRidge(alpha_1=1.0, alpha_2=NOISE**2).fit(x - self._mean, y)
        self._weights, self._bias, self._covariance = model.coef_, float(model.intercept_), model.sigma_
        self.noise = float(model.alpha_) ** -0.5
        """Standard deviation of a rating from what any linear model of the vectors could say."""

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Expected rating, which may lie beyond 0..1, and the standard deviation of the rating from it: both `(N,)`."""
        expected = (x - self._mean) @ self._weights + self._bias
        return expected, np.sqrt(self.noise**2 + self._open(x))

    def explore(self, x: np.ndarray, count: int, take: Callable[[int], bool]) -> list[int]:
        """Up to `count` rows of `x (N, D)` to rate next, out of those that `take` accepts when asked.

        The most uncertain first, and each next one as if those before it had been rated: what a rating would be is
        not needed to know how much it would tell, and songs alike are not asked for twice.
        """
        variance, centred = self._open(x), (x - self._mean).astype(np.float32)
        told: list[np.ndarray] = []  # rows u, so that covariance - sum(u u^T) is what the picks leave
        picked: list[int] = []
        for _ in range(len(x)):
            if len(picked) == count:
                break
            row = int(variance.argmax())
            if take(row):
                picked.append(row)
                here = centred[row].astype(np.float64)
                direction = self._covariance @ here - sum((u * (u @ here) for u in told), np.zeros_like(here))
                told.append(direction / np.sqrt(self.noise**2 + max(here @ direction, 0.0)))
                variance -= (centred @ told[-1].astype(np.float32)).astype(np.float64) ** 2
            variance[row] = -np.inf
        return picked

    def _open(self, x: np.ndarray) -> np.ndarray:
        """Variance `(N,)` that the rated songs leave in the expected rating."""
        variance = np.empty(len(x))
        for start in range(0, len(x), _BLOCK):
            block = x[start : start + _BLOCK] - self._mean
            variance[start : start + _BLOCK] = ((block @ self._covariance) * block).sum(axis=1)
        return variance.clip(min=0)
