"""The one nearest-neighbour search, by cosine.

Cosines are computed by the library of the vectors (NumPy, or torch on its device). The order is stable: of equally near
songs the first row comes first.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from simsiam_dali.evaluation.within_song import WithinSong

if TYPE_CHECKING:  # torch takes seconds and 500 MB, which those that search in arrays need not spend
    from torch import Tensor

Vectors = TypeVar("Vectors", np.ndarray, "Tensor")

VOTE_TEMPERATURE = 0.07
"""A neighbour's vote weighs exp(cosine / temperature): Wu et al. 2018, arXiv:1805.01978, section 3.4."""
BLOCK = 1024
"""Queries compared with the whole bank at a time, to bound the memory: their cosines with 100,000 songs are 400 MB."""
RANK_TOLERANCE = 1e-6
"""Principal components with less than this fraction of the largest variance are rounding errors of float32."""


def unit(vectors: np.ndarray, within: WithinSong | None = None, whiten: bool = True) -> np.ndarray:
    """`(N, D)` to L2-normalised vectors, float32, by which songs are compared.

    Each dimension is standardised over all rows, which removes what all songs have in common and would make any two of
    them look alike; then come `within.normalised`, `(N, D)`, or `half_whitened` without `within`, `(N, min(N, D))`.
    whiten: False leaves both out.
    """
    from sklearn.preprocessing import StandardScaler  # here, so that training does not need scikit-learn

    scaler = StandardScaler()
    x: np.ndarray = scaler.fit_transform(vectors.astype(np.float32))
    if not whiten:
        return l2_normalised(x)
    return l2_normalised(within.normalised(x, scaler.scale_) if within else half_whitened(x))


def l2_normalised(vectors: np.ndarray) -> np.ndarray:
    """Each row `(N, D)` divided by its length; a row of zeros stays."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)


def half_whitened(x: np.ndarray) -> np.ndarray:
    """Principal components `(N, min(N, D))` of centred `(N, D)`, each divided by the root of its standard deviation.

    A few directions hold most of an embedding's variance, and would decide alone which songs are near. Whitening makes
    all count the same, noise too; this is half the way: eigen_power = -1/4 of FAISS's PCAMatrix, where -1/2 whitens.
    What it gains is measured in docs/experiments.md.
    """
    songs, dims = x.shape
    if songs < dims:  # the rows' Gram matrix has the same eigenvalues, and the components for eigenvectors
        variance, components = np.linalg.eigh(x @ x.T / songs)
        return components * (songs**0.5 * _above_rounding(variance) ** 0.25)
    variance, axes = np.linalg.eigh(x.T @ x / songs)
    variance = _above_rounding(variance)
    return x @ (axes * np.divide(1, variance**0.25, out=np.zeros_like(variance), where=variance > 0))


def _above_rounding(variance: np.ndarray) -> np.ndarray:
    """Ascending variances, those below float32's rounding of the last as 0."""
    return np.where(variance > RANK_TOLERANCE * variance[-1], variance, 0)


def cosine_blocks(query: Vectors, bank: Vectors) -> Iterator[tuple[slice, np.ndarray]]:
    """Cosines of unit vectors `(Q, D)` and `(N, D)`, block by block: the rows of `query`, and `(rows, N)`."""
    for start in range(0, len(query), BLOCK):
        rows = slice(start, start + BLOCK)
        cosine = query[rows] @ bank.T
        yield rows, cosine if isinstance(cosine, np.ndarray) else cosine.numpy(force=True)


def nearest(
    query: Vectors, bank: Vectors, k: int, groups: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `bank (N, D)` nearest to each of `query (Q, D)`, nearest first, and their cosines: both `(Q, k)`.

    Both are unit vectors. groups: the group of each query `(Q,)` and of each row of the bank `(N,)`; rows of a query's
    own group are skipped. Where fewer than k rows are left, the row is -1 and the cosine -inf.
    """
    found, cosine = np.full((len(query), k), -1), np.full((len(query), k), -np.inf, np.float32)
    k = min(k, len(bank))
    for rows, block in cosine_blocks(query, bank):
        distance = np.negative(block, out=block)
        if groups:
            distance[groups[0][rows, None] == groups[1]] = np.inf
        columns = _first(distance, k)
        found[rows, :k], cosine[rows, :k] = columns, -np.take_along_axis(distance, columns, axis=1)
    found[np.isneginf(cosine)] = -1
    return found, cosine


def nearest_others(x: np.ndarray, group: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` among unit vectors `(N, D)` themselves, none of a row's own group `(N,)`: both `(N, k)`."""
    return nearest(x, x, k, (group, group))


def _first(distance: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k smallest of each row `(B, N)`, ascending; of equals the first: a stable sort, but O(N)."""
    columns = np.argpartition(distance, k - 1, axis=1)[:, :k]
    last = np.take_along_axis(distance, columns[:, -1:], axis=1)
    # A partition chooses among equals at will.
    for row in np.flatnonzero((~(distance > last)).sum(axis=1) > k):
        columns[row] = np.argsort(distance[row], kind="stable")[:k]
    columns.sort(axis=1)
    order = np.argsort(np.take_along_axis(distance, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


def vote(labels: np.ndarray, near: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """The one of `labels (N,)` int that a row's neighbours vote for, weighted by similarity, `(Q,)`; -1 without any.

    `near` and `cosine` as `nearest` returns them. Of labels with equal votes the one with the nearest song wins.
    """
    labels = np.where(near >= 0, labels[near], -1)
    same = labels[:, :, None] == labels[:, None, :]
    weight = np.where(labels < 0, 0, np.exp(cosine.astype(np.float64) / VOTE_TEMPERATURE))
    votes = (same * weight[:, None, :]).sum(axis=2)  # (Q, k): the sum of the votes for each neighbour's label
    return np.take_along_axis(labels, votes.argmax(axis=1)[:, None], axis=1)[:, 0]
