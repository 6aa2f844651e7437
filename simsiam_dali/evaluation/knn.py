"""kNN scores of embeddings: accuracy of the neighbours' vote, error of their mean rating, and what a guess reaches.

Everything here is torch on the device of its inputs, to be called outside autocast. Embeddings are compared by cosine
and not standardised first, so that a score is of what `embed` gives, whatever other songs are there.

A score takes a bank (training songs) and queries (validation songs), one row a song; the caller sees to it that no song
is in both. It is NaN where nothing can be scored, and is to be read beside its chance level.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

UNKNOWN_LABEL = -1
# A neighbour's vote weighs exp(cosine / temperature): Wu et al. 2018, arXiv:1805.01978, section 3.4.
VOTE_TEMPERATURE = 0.07
# Bounds how many similarities are held at a time: 512 queries on a bank of 100,000 songs are 200 MB.
QUERIES_AT_ONCE = 512


def unit(vectors: np.ndarray) -> np.ndarray:
    """Each dimension standardised over all songs, then each vector scaled to length 1: `(N, D)` float32.

    Their inner product is the similarity of the k-NN probe (`probes.neighbours`). Standardising takes out what all
    songs have in common, which would make any two of them look alike.
    """
    from sklearn.preprocessing import (
        StandardScaler,  # here, since training imports this module and needs no scikit-learn
    )

    standardised = StandardScaler().fit_transform(vectors.astype(np.float32))
    return standardised / np.linalg.norm(standardised, axis=1, keepdims=True).clip(min=1e-12)


def knn_labels(bank: Tensor, bank_labels: Tensor, query: Tensor, query_labels: Tensor, k: int) -> float:
    """Accuracy of the k nearest neighbours' vote, weighted by similarity.

    `bank` `(N, D)`, `query` `(Q, D)`, float; labels `(N,)` and `(Q,)`, int64, one a song. Rows with
    `UNKNOWN_LABEL` are left out, and so are queries whose label no song of the bank has: no vote could be
    right. Of labels with equal votes the one with the nearest song wins; of equally near songs, the first.
    """
    known = bank_labels != UNKNOWN_LABEL
    bank, bank_labels = bank[known], bank_labels[known]
    scored = torch.isin(query_labels, bank_labels)
    if not scored.any():
        return math.nan
    similarity, neighbour = _nearest(bank, query[scored], k)
    labels = bank_labels[neighbour]
    weight = torch.exp(similarity / VOTE_TEMPERATURE)
    same = labels[:, :, None] == labels[:, None, :]
    votes = (same * weight[:, None, :]).sum(dim=2)  # (Q, k): all that is cast for each neighbour's label
    winner = votes.argmax(dim=1, keepdim=True)
    predicted = labels.gather(1, winner).squeeze(1)
    return (predicted == query_labels[scored]).float().mean().item()


def label_chance(bank_labels: Tensor, query_labels: Tensor) -> tuple[float, float]:
    """Accuracy, on the queries that `knn_labels` scores, of two guesses that hear nothing.

    The bank's commonest label each time, and labels drawn at the bank's frequencies (expected accuracy).
    """
    known = bank_labels[bank_labels != UNKNOWN_LABEL]
    scored = query_labels[torch.isin(query_labels, known)]
    if len(scored) == 0:
        return math.nan, math.nan
    labels, count = torch.unique(known, return_counts=True)
    majority = (scored == labels[count.argmax()]).float().mean()
    drawn = (count / len(known))[torch.searchsorted(labels, scored)].mean()
    return majority.item(), drawn.item()


def knn_rating(bank: Tensor, bank_ratings: Tensor, query: Tensor, query_ratings: Tensor, k: int) -> tuple[float, float]:
    """Mean absolute error and Pearson correlation of the k nearest neighbours' mean rating.

    `bank` `(N, D)`, `query` `(Q, D)`; ratings `(N,)` and `(Q,)`, float, 0 to 1, NaN = unrated and left out.
    The correlation is NaN where the ratings or the predictions are all equal.
    """
    rated = ~bank_ratings.isnan()
    bank, bank_ratings = bank[rated], bank_ratings[rated]
    scored = ~query_ratings.isnan()
    if not scored.any() or len(bank) == 0:
        return math.nan, math.nan
    truth = query_ratings[scored].double()
    predicted = bank_ratings[_nearest(bank, query[scored], k)[1]].double().mean(dim=1)
    error = (predicted - truth).abs().mean().item()
    # With k as large as the bank all predictions are one mean, up to rounding: that has no correlation.
    if min(truth.std(correction=0), predicted.std(correction=0)) < 1e-9:
        return error, math.nan
    return error, torch.corrcoef(torch.stack([predicted, truth]))[0, 1].item()


def rating_chance(bank_ratings: Tensor, query_ratings: Tensor) -> float:
    """Mean absolute error of predicting the bank's mean rating for every rated query."""
    return (query_ratings - bank_ratings.nanmean()).abs().nanmean().item()


def _nearest(bank: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine and bank row of each query's nearest songs, nearest first, both `(Q, min(k, N))`."""
    bank, query = F.normalize(bank.float(), dim=1), F.normalize(query.float(), dim=1)
    similarities, rows = [], []
    for part in query.split(QUERIES_AT_ONCE):
        # a stable sort, since topk leaves the order of equals to chance
        similarity, row = torch.sort(part @ bank.T, dim=1, descending=True, stable=True)
        similarities.append(similarity[:, :k].clone())  # a slice alone would keep the whole row in memory
        rows.append(row[:, :k].clone())
    return torch.cat(similarities), torch.cat(rows)
