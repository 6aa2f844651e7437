"""Metrics, their bootstrap intervals, and whether a figure can be told apart from its floors."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Arrays = tuple[np.ndarray, ...]
"""What a metric is computed from: (truth, prediction), or (score of each song,). The first axis is the songs."""


def mse(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean squared error."""
    return float(np.mean((truth - predicted) ** 2))


def mae(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean absolute error."""
    return float(np.mean(np.abs(truth - predicted)))


def correlation(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson's; NaN where one of them is constant."""
    if np.ptp(truth) == 0 or np.ptp(predicted) < 1e-12:
        return math.nan
    return float(np.corrcoef(truth, predicted)[0, 1])


def accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Share of right classes."""
    return float(np.mean(truth == predicted))


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """The F1 of each class that is true of a song, averaged; classes are ints from 0, a prediction may be -1 (none)."""
    size = max(truth.max(), predicted.max()) + 1
    true, said = np.bincount(truth, minlength=size), np.bincount(predicted[predicted >= 0], minlength=size)
    right = np.bincount(truth[truth == predicted], minlength=size)
    return float(np.mean((2 * right / np.maximum(true + said, 1))[true > 0]))


def mean(values: np.ndarray) -> float:
    """Of a score that each song has, such as its AP@10."""
    return float(np.mean(values))


@dataclass(frozen=True)
class Metric:
    """`sign`: 1 where higher is better, -1 where lower is."""

    compute: Callable[..., float]
    sign: int


METRICS = {
    "mse": Metric(mse, -1),
    "mae": Metric(mae, -1),
    "correlation": Metric(correlation, 1),
    "accuracy": Metric(accuracy, 1),
    "macro_f1": Metric(macro_f1, 1),
    "map_at_10": Metric(mean, 1),
}


@dataclass(frozen=True)
class Score:
    """A figure and its 95% percentile bootstrap interval over songs; `resampled (R,)` are its values there."""

    value: float
    low: float
    high: float
    resampled: np.ndarray

    @property
    def known(self) -> bool:
        """Whether there is a value: a correlation with a constant is none."""
        return not math.isnan(self.value)


def score(metric: Metric, arrays: Arrays, resamples: int, seed: int) -> Score:
    """Score `arrays`. Equal numbers of songs and equal seeds draw equal songs, so that scores can be paired."""
    rng = np.random.default_rng(seed)
    n = len(arrays[0])
    draws = (rng.integers(0, n, n) for _ in range(resamples))
    resampled = np.array([metric.compute(*(a[rows] for a in arrays)) for rows in draws])
    return Score(metric.compute(*arrays), *interval(resampled), resampled)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95% of `values`, NaN left out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def verdict(metric: Metric, ours: Score, floors: Mapping[str, Score]) -> str:
    """Where the 95% interval of the paired differences to each floor lies: above 0, below, or around it."""
    if not ours.known:
        return "undefined: constant"
    worse, undecided = [], []
    known = {name: floor for name, floor in floors.items() if floor.known}
    for name, floor in known.items():
        low, high = interval(metric.sign * (ours.resampled - floor.resampled))
        if high < 0:
            worse.append(name)
        elif not low > 0:
            undecided.append(name)
    if worse:
        return f"worse than {', '.join(worse)}"
    if undecided:
        return f"not told apart from {', '.join(undecided)}"
    if not known:
        return "no floor to compare with"
    return "better than every floor" if len(known) > 1 else f"better than {next(iter(known))}"
