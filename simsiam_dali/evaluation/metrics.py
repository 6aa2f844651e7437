"""Metrics, their bootstrap intervals, and whether a figure differs from its baselines."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Arrays = tuple[np.ndarray, ...]
"""A metric's arguments: (truth, prediction), or (score of each song,). The first axis is the songs."""


def correlation(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson correlation; NaN where one of them is constant."""
    if np.ptp(truth) == 0 or np.ptp(predicted) < 1e-12:
        return math.nan
    return float(np.corrcoef(truth, predicted)[0, 1])


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """The mean F1 of the classes in `truth`; classes are ints from 0, a prediction may be -1 (none)."""
    size = max(truth.max(), predicted.max()) + 1
    actual, positive = np.bincount(truth, minlength=size), np.bincount(predicted[predicted >= 0], minlength=size)
    correct = np.bincount(truth[truth == predicted], minlength=size)
    return float(np.mean((2 * correct / np.maximum(actual + positive, 1))[actual > 0]))


@dataclass(frozen=True)
class Metric:
    """`sign`: 1 where higher is better, -1 where lower is."""

    compute: Callable[..., float]
    sign: int


# In NumPy: scikit-learn's checks of its arguments take many times as long as a resample of a few hundred songs.
METRICS = {
    "mse": Metric(lambda truth, predicted: np.mean((truth - predicted) ** 2), -1),
    "mae": Metric(lambda truth, predicted: np.mean(np.abs(truth - predicted)), -1),
    "correlation": Metric(correlation, 1),
    "accuracy": Metric(lambda truth, predicted: np.mean(truth == predicted), 1),
    "macro_f1": Metric(macro_f1, 1),
    "map_at_10": Metric(np.mean, 1),  # of each song's AP@10
}


MIN_GROUPS = 10
"""Fewest groups of which an interval is given: of fewer, resampling would make it much too narrow."""


@dataclass(frozen=True)
class Score:
    """A metric's value, its 95% percentile bootstrap interval, and its values in the resamples `(R,)`.

    NaN where it is undefined: the correlation with a constant is, and the interval of too few groups.
    """

    value: float
    low: float
    high: float
    resampled: np.ndarray


def score(metric: Metric, arrays: Arrays, together: np.ndarray, resamples: int, seed: int) -> Score:
    """Score `arrays`. Equal `together` and equal seeds draw the same resamples, so that scores can be paired.

    together `(N,)` int: songs with the same number are drawn together. The songs of an album or an artist resemble each
    other: drawn one by one, as if each said something new, they would give an interval that is too narrow (Davison and
    Hinkley, "Bootstrap Methods and their Application", section 3.8).
    """
    rng = np.random.default_rng(seed)
    number, size = np.unique(together, return_inverse=True, return_counts=True)[1:]
    rows, first = np.argsort(number, kind="stable"), np.cumsum(size) - size
    resampled = np.full(resamples, math.nan)
    if len(size) >= MIN_GROUPS:
        for i in range(resamples):
            drawn = rng.integers(0, len(size), len(size))
            # The indices in the arrays of the songs of each group drawn, one group after the other.
            starts = np.repeat(first[drawn] - (np.cumsum(size[drawn]) - size[drawn]), size[drawn])
            songs = rows[starts + np.arange(len(starts))]
            resampled[i] = metric.compute(*(a[songs] for a in arrays))
    return Score(float(metric.compute(*arrays)), *interval(resampled), resampled)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95% of `values`, NaN left out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def verdict(metric: Metric, ours: Score, baselines: Mapping[str, Score]) -> str:
    """Whether the 95% interval of the paired differences to each baseline lies above 0, below 0, or contains it."""
    if math.isnan(ours.value):
        return "undefined: constant"
    if np.isnan(ours.resampled).all():
        return "too few groups of songs to tell"
    worse, undecided = [], []
    known = {name: baseline for name, baseline in baselines.items() if not math.isnan(baseline.value)}
    for name, baseline in known.items():
        low, high = interval(metric.sign * (ours.resampled - baseline.resampled))
        if high < 0:
            worse.append(name)
        elif not low > 0:
            undecided.append(name)
    if worse:
        return f"worse than {', '.join(worse)}"
    if undecided:
        return f"no clear difference from {', '.join(undecided)}"
    if not known:
        return "no baseline to compare with"
    return "better than every baseline" if len(known) > 1 else f"better than {next(iter(known))}"
