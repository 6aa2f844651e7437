"""The one nearest-neighbour search, by cosine, and the kNN scores of a training's validation.

Cosines are computed by the library of the vectors (NumPy, or torch on its device). The order is stable: of equally near
songs the first row comes first.

The scores take `bank` (training songs, `(N, D)` float) and `query` (validation songs, `(Q, D)`), and a label (int64) or
a rating (float, 0 to 1) of each song, as torch tensors; no song may be in both. The embeddings are not standardised, so
that a score describes what `embed` returns, whatever other songs there are. A score is NaN where none can be scored.
"""

import math
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Vectors = TypeVar("Vectors", np.ndarray, Tensor)

UNKNOWN_LABEL = -1
VOTE_TEMPERATURE = 0.07
"""A neighbour's vote weighs exp(cosine / temperature): Wu et al. 2018, arXiv:1805.01978, section 3.4."""
BLOCK = 1024
"""Queries compared with the whole bank at a time, to bound the memory: their cosines with 100,000 songs are 400 MB."""


def unit(vectors: np.ndarray, standardise: bool = True) -> np.ndarray:
    """`(N, D)` to vectors of length 1, float32; first with each dimension standardised over all rows.

    Standardising removes what all songs have in common, which would make any two of them look alike.
    """
    vectors = vectors.astype(np.float32)
    if standardise:
        from sklearn.preprocessing import StandardScaler  # here, so that training does not need scikit-learn

        vectors = StandardScaler().fit_transform(vectors)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)


def cosine_blocks(query: Vectors, bank: Vectors) -> Iterator[tuple[slice, np.ndarray]]:
    """Cosines of unit vectors `(Q, D)` and `(N, D)`, block by block: the rows of `query`, and `(rows, N)`."""
    for start in range(0, len(query), BLOCK):
        rows = slice(start, start + BLOCK)
        cosine = query[rows] @ bank.T
        yield rows, cosine.numpy(force=True) if isinstance(cosine, Tensor) else cosine


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


def nearest_others(
    vectors: np.ndarray, group: np.ndarray, k: int, standardise: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` among the rows `(N, D)` themselves, of any length, none of a row's own group `(N,)`: both `(N, k)`."""
    x = unit(vectors, standardise)
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


def knn_labels(bank: Tensor, bank_labels: Tensor, query: Tensor, query_labels: Tensor, k: int) -> float:
    """Accuracy of the k nearest neighbours' vote, weighted by similarity.

    Rows with `UNKNOWN_LABEL` are left out, and so are queries whose label no song of the bank has.
    """
    known = bank_labels != UNKNOWN_LABEL
    bank, bank_labels = bank[known], bank_labels[known]
    scored = torch.isin(query_labels, bank_labels)
    if not scored.any():
        return math.nan
    predicted = torch.from_numpy(vote(bank_labels.numpy(force=True), *_nearest(bank, query[scored], k)))
    return (predicted == query_labels[scored].cpu()).float().mean().item()


def label_chance(bank_labels: Tensor, query_labels: Tensor) -> float:
    """Accuracy, on the queries that `knn_labels` scores, of the better of two guesses that ignore the embeddings.

    The bank's commonest label each time, or labels drawn at the bank's frequencies (expected accuracy).
    """
    known = bank_labels[bank_labels != UNKNOWN_LABEL]
    scored = query_labels[torch.isin(query_labels, known)]
    if len(scored) == 0:
        return math.nan
    frequency = torch.bincount(known) / len(known)
    majority, drawn = (scored == frequency.argmax()).float().mean(), frequency[scored].mean()
    return max(majority.item(), drawn.item())


def knn_rating(bank: Tensor, bank_ratings: Tensor, query: Tensor, query_ratings: Tensor, k: int) -> tuple[float, float]:
    """Mean absolute error and Pearson correlation of the k nearest neighbours' mean rating; NaN is unrated, left out.

    The correlation is NaN where the ratings or the predictions are all equal.
    """
    rated = ~bank_ratings.isnan()
    bank, bank_ratings = bank[rated], bank_ratings[rated]
    scored = ~query_ratings.isnan()
    if not scored.any() or len(bank) == 0:
        return math.nan, math.nan
    truth = query_ratings[scored].double()
    near, _ = _nearest(bank, query[scored], k)
    predicted = bank_ratings[torch.from_numpy(near).to(bank.device)].double().mean(dim=1)
    error = (predicted - truth).abs().mean().item()
    # With k as large as the bank all predictions are one mean, up to rounding: that has no correlation.
    if min(truth.std(correction=0), predicted.std(correction=0)) < 1e-9:
        return error, math.nan
    return error, torch.corrcoef(torch.stack([predicted, truth]))[0, 1].item()


def rating_chance(bank_ratings: Tensor, query_ratings: Tensor) -> float:
    """Mean absolute error of predicting the bank's mean rating for every rated query."""
    return (query_ratings - bank_ratings.nanmean()).abs().nanmean().item()


def _nearest(bank: Tensor, query: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` of vectors that are not of length 1 yet, `(Q, min(k, N))`."""
    return nearest(F.normalize(query.float(), dim=1), F.normalize(bank.float(), dim=1), min(k, len(bank)))
