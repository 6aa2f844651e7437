"""Probes: what a simple model, trained on other songs, predicts from the vectors.

Models take vectors `x (N, D)`, float32, and folds of row numbers, and predict each row from a model that has not seen
it, with each dimension standardised by the mean and std of the training rows.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import csr_array
from sklearn.base import BaseEstimator
from sklearn.compose import TransformedTargetRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler

from simsiam_dali.evaluation.folds import Folds, folds
from simsiam_dali.evaluation.knn import BLOCK

ALPHAS = tuple(10.0**power for power in range(6))
"""Ridge penalties to choose from, on standardised dimensions."""
INNER_FOLDS = 3
LOGISTIC_C = 0.1
LOGISTIC_TOL = 1e-3
"""Of the loss's gradient. With scikit-learn's 1e-4, vectors by stages took seven times as long and scored no better."""
HIDDEN = 64
MLP_ALPHA = 30.0
"""Weight decay, divided by the number of songs: with none of it, a few hundred songs are learned by heart."""


def ridge(x: np.ndarray, y: np.ndarray, parts: Folds, group: np.ndarray) -> np.ndarray:
    """Ratings by ridge regression, `(N,)` in 0..1; alpha by cross-validation over the training rows' own groups."""

    def model(train: np.ndarray) -> BaseEstimator:
        inner = folds(group[train], n=INNER_FOLDS) or None  # None, of one group only: leave-one-out
        return RidgeCV(ALPHAS, cv=inner, scoring="neg_mean_squared_error")

    return _out_of_fold(x.astype(np.float64), y, parts, model).clip(0, 1)


def mlp(x: np.ndarray, y: np.ndarray, parts: Folds, seed: int) -> np.ndarray:
    """Ratings by a perceptron with one hidden layer, `(N,)` in 0..1."""

    def model(_train: np.ndarray) -> BaseEstimator:
        perceptron = MLPRegressor(hidden_layer_sizes=(HIDDEN,), alpha=MLP_ALPHA, max_iter=100, random_state=seed)
        # Standardised ratings: a few dozen songs are not enough to learn the mean by gradient steps.
        return TransformedTargetRegressor(perceptron, transformer=StandardScaler())

    return _out_of_fold(x.astype(np.float64), y, parts, model).clip(0, 1)


def logistic(x: np.ndarray, classes: np.ndarray, parts: Folds) -> np.ndarray:
    """Classes `(N,)` int by multinomial logistic regression."""
    return _out_of_fold(x, classes, parts, lambda _: LogisticRegression(C=LOGISTIC_C, tol=LOGISTIC_TOL, max_iter=500))


def _out_of_fold(
    x: np.ndarray, y: np.ndarray, parts: Folds, model: Callable[[np.ndarray], BaseEstimator]
) -> np.ndarray:
    predicted = np.empty_like(y)
    for train, test in parts:
        if (y[train] == y[train[0]]).all():  # nothing to learn, and scikit-learn refuses a single class
            predicted[test] = y[train[0]]
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that stops early is a weaker probe
            predicted[test] = make_pipeline(StandardScaler(), model(train)).fit(x[train], y[train]).predict(x[test])
    return predicted


def constant_guess(y: np.ndarray, parts: Folds, constant: Callable[[np.ndarray], float] = np.mean) -> np.ndarray:
    """The training rows' mean, or another `constant` of them, `(N,)`: the prediction without any vectors."""
    guess = np.empty_like(y)
    for train, test in parts:
        guess[test] = constant(y[train])
    return guess


def others_mean(y: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The mean `(N,)` over the rows of all other groups `(N,)`, two or more: k-NN's prediction without any vectors."""
    _, own = np.unique(group, return_inverse=True)
    total, number = np.bincount(own, y), np.bincount(own)
    return ((y.sum() - total) / (len(y) - number))[own]


def majority_guess(classes: np.ndarray) -> np.ndarray:
    """The commonest class of all rows, `(N,)`."""
    # Among classes of equal size, the commonest of the training rows is always one that the test rows lack.
    return np.full_like(classes, np.bincount(classes).argmax())


def knn_mean(y: np.ndarray, near: np.ndarray) -> np.ndarray:
    """The neighbours' mean rating `(N,)`; the mean of all where a row has no neighbour."""
    there = near >= 0
    total, number = (y[near] * there).sum(axis=1), there.sum(axis=1)
    return np.where(number > 0, total / number.clip(min=1), y.mean())


def label_matrix(labels: Sequence[Sequence[int]]) -> csr_array:
    """1 where a row has a label: `(N, labels)` int."""
    return csr_array(MultiLabelBinarizer(sparse_output=True).fit_transform(labels))


class Retrieval:
    """mAP@k: do a song's nearest songs share one of its `labels` (numbers)? Songs of its own group are not counted.

    Rows with no relevant row at all cannot be scored: `scored (N,)` bool.
    """

    def __init__(self, labels: Sequence[Sequence[int]], group: np.ndarray, k: int) -> None:
        self._labels, self._k = label_matrix(labels), k
        self.relevant = np.zeros(len(labels), int)
        self.candidates = np.zeros(len(labels), int)
        for start in range(0, len(labels), BLOCK):
            block = slice(start, start + BLOCK)
            other = group[block, None] != group
            self.relevant[block] = ((self._labels[block] @ self._labels.T).toarray() * other > 0).sum(axis=1)
            self.candidates[block] = other.sum(axis=1)
        self.scored = self.relevant > 0

    def average_precision(self, near: np.ndarray) -> np.ndarray:
        """AP@k of the scored rows, from all rows' neighbours `(N, >=k)`.

        The mean, over the relevant rows that could be among the first k, of the share of relevant ones down to each.
        """
        near, own = near[self.scored, : self._k], self._labels[self.scored]
        shared = [own.multiply(self._labels[column]).sum(axis=1) for column in near.T]
        hit = (np.stack(shared, axis=1) > 0) & (near >= 0)
        precision = hit.cumsum(axis=1) / np.arange(1, hit.shape[1] + 1)
        return (precision * hit).sum(axis=1) / np.minimum(self._k, self.relevant[self.scored])

    def guess(self) -> np.ndarray:
        """The expected AP@k of the scored rows in a random order."""
        relevant, others = self.relevant[self.scored, None], self.candidates[self.scored, None]
        rank = np.arange(1, self._k + 1)
        # Rank i is relevant with R/M; given that, each of the i - 1 before it is with (R - 1)/(M - 1).
        before = (rank - 1) * (relevant - 1) / (others - 1).clip(min=1)
        share = (rank <= others) * relevant / others * (1 + before) / rank
        return share.sum(axis=1) / np.minimum(self._k, relevant[:, 0])
