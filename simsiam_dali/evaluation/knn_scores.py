"""The kNN scores of a training's validation: labels and ratings, beside guesses that ignore the embeddings.

The scores take `bank` (training songs, `(N, D)` float) and `query` (validation songs, `(Q, D)`), and a label (int64) or
a rating (float, 0 to 1) of each song, as torch tensors; no song may be in both. The embeddings are not standardised, so
that a score describes what `embed` returns, whatever other songs there are. A score is NaN where none can be scored.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam_dali.evaluation.knn import nearest, vote

UNKNOWN_LABEL = -1


def knn_labels(bank: Tensor, bank_labels: Tensor, query: Tensor, query_labels: Tensor, k: int) -> float:
    """Accuracy of the k nearest neighbours' vote, weighted by similarity.

    Rows with `UNKNOWN_LABEL` are left out, and so are queries whose label no song of the bank has.
    """
    scored = scored_queries(bank_labels, query_labels)
    known = bank_labels != UNKNOWN_LABEL
    bank, bank_labels = bank[known], bank_labels[known]
    if not scored.any():
        return math.nan
    predicted = torch.from_numpy(vote(bank_labels.numpy(force=True), *_nearest(bank, query[scored], k)))
    return (predicted == query_labels[scored].cpu()).float().mean().item()


def scored_queries(bank_labels: Tensor, query_labels: Tensor) -> Tensor:
    """Which queries have a label that a song of the bank has too: bool `(Q,)`."""
    return torch.isin(query_labels, bank_labels[bank_labels != UNKNOWN_LABEL])


def label_chance(bank_labels: Tensor, query_labels: Tensor) -> float:
    """Accuracy, on the queries that `knn_labels` scores, of the better of two guesses that ignore the embeddings.

    The bank's commonest label each time, or labels drawn at the bank's frequencies (expected accuracy).
    """
    known = bank_labels[bank_labels != UNKNOWN_LABEL]
    scored = query_labels[scored_queries(bank_labels, query_labels)]
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
    """Mean absolute error of predicting the bank's median rating for every rated query: the best constant is a median.

    The mean's error is larger, so that worse than a constant could look better than chance.
    """
    return (query_ratings - bank_ratings.nanquantile(0.5)).abs().nanmean().item()


def _nearest(bank: Tensor, query: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` of vectors that are not of length 1 yet, `(Q, min(k, N))`."""
    return nearest(F.normalize(query.float(), dim=1), F.normalize(bank.float(), dim=1), min(k, len(bank)))
