"""Predict the ratings of unrated songs: Bayesian ridge regression from vectors to ratings.

The model is linear, since a few dozen ratings support no more, and ridge is the probe that `evaluate` scores. Its
Bayesian form (MacKay 1992, doi:10.1162/neco.1992.4.3.415) estimates the strength of the prior and the noise of the
ratings from the ratings alone, without held-out songs, and gives each prediction a variance: the noise, plus the
posterior variance of the expected rating. The latter is large for a song unlike all rated ones, and shrinks around each
song that gets a rating. The vectors have length 1, so no song is uncertain only because its vector is long.
"""

from collections.abc import Callable

import numpy as np
from sklearn.linear_model import BayesianRidge

MIN_RATED = 10
NOISE = 0.1
"""Prior standard deviation between two ratings of one song by the same person: half a star of five.

It weighs as much as two songs; without it the first few ratings would count as exact.
"""
ROUNDING = 1e-12
"""Directions with less than this fraction of the largest variance are rounding errors of float32."""
_BLOCK = 4096


class RatingModel:
    """Fitted to ratings `y (R,)` in 0..1 of the songs with unit vectors `x (R, D)`; at least two of them differ."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self._mean = x.mean(axis=0, dtype=np.float64)
        centred = x - self._mean
        basis = _row_space(centred)
        model = BayesianRidge(alpha_1=1.0, alpha_2=NOISE**2).fit(centred @ basis.T, y)
        self._weights, self._bias = basis.T @ model.coef_, float(model.intercept_)
        # The posterior covariance is what the ratings leave of the prior: prior I - known known^T.
        self._prior = 1 / float(model.lambda_)
        variance, axes = np.linalg.eigh(model.sigma_)
        self._known = basis.T @ (axes * np.sqrt((self._prior - variance).clip(min=0)))  # (D, K)
        self.noise = float(model.alpha_) ** -0.5
        """Standard deviation of the ratings around the best linear model of the vectors."""

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Expected rating, which may lie beyond 0..1, and the standard deviation of the rating from it: both `(N,)`."""
        expected = (x - self._mean) @ self._weights + self._bias
        return expected, np.sqrt(self.noise**2 + self._posterior_variance(x))

    def explore(self, x: np.ndarray, count: int, accept: Callable[[int], bool]) -> list[int]:
        """Up to `count` rows of `x (N, D)` to rate next, of those that `accept` returns True for.

        The most uncertain first, and each next one as if those before it had been rated: the posterior variance does
        not depend on the rating itself, and similar songs are not chosen twice.
        """
        variance, centred = self._posterior_variance(x), x - self._mean.astype(np.float32)
        updates: list[np.ndarray] = []  # u, so that covariance - sum(u u^T) is the covariance after the picks
        picked: list[int] = []
        for _ in range(len(x)):
            if len(picked) == count:
                break
            row = int(variance.argmax())
            if accept(row):
                picked.append(row)
                here = centred[row].astype(np.float64)
                direction = self._times_covariance(here) - sum((u * (u @ here) for u in updates), np.zeros_like(here))
                updates.append(direction / np.sqrt(self.noise**2 + max(here @ direction, 0.0)))
                variance -= (centred @ updates[-1].astype(np.float32)).astype(np.float64) ** 2
            variance[row] = -np.inf
        return picked

    def _posterior_variance(self, x: np.ndarray) -> np.ndarray:
        """Posterior variance `(N,)` of the expected rating."""
        variance = np.empty(len(x))
        for start in range(0, len(x), _BLOCK):
            block = x[start : start + _BLOCK] - self._mean
            known = ((block @ self._known) ** 2).sum(axis=1)
            variance[start : start + _BLOCK] = self._prior * (block**2).sum(axis=1) - known
        return variance.clip(min=0)

    def _times_covariance(self, x: np.ndarray) -> np.ndarray:
        """Centred vectors `(..., D)` times the posterior covariance of the weights."""
        return self._prior * x - (x @ self._known) @ self._known.T


def _row_space(x: np.ndarray) -> np.ndarray:
    """Orthonormal rows `(K, D)` that span the rows of `x (R, D)`, float64.

    The ratings say nothing of directions in which the rated songs do not differ: there the prior stays, and the model
    need not have them. It is small when few songs are rated, however wide the vectors.
    """
    rated, dims = x.shape
    if rated > dims:
        return np.eye(dims)
    variance, axes = np.linalg.eigh(x @ x.T)
    kept = variance > ROUNDING * variance[-1]
    return (axes[:, kept] / np.sqrt(variance[kept])).T @ x
