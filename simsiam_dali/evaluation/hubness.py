"""Hubness: in many dimensions some songs are near to very many others, and some are near to none.

Both measures are of the k-occurrence N_k, the number of songs that have a given song among their k nearest
(Radovanovic et al., JMLR 11:2487, 2010): a hub is recommended all the time, a song that is nobody's neighbour never.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import skew

from simsiam_dali.evaluation.knn import nearest_others


@dataclass(frozen=True)
class Hubness:
    """skewness: of N_k, 0 without hubs. never: share of the songs that are no other song's neighbour (N_k = 0)."""

    skewness: float
    never: float


def hubness(x: np.ndarray, group: np.ndarray, k: int) -> Hubness:
    """Of vectors `(N, D)`, nearest as by `nearest_others`; songs of one group `(N,)` are no neighbours."""
    return of_neighbours(nearest_others(x, group, k)[0])


def of_neighbours(near: np.ndarray) -> Hubness:
    """Of each song's nearest `(N, k)`, -1 where there is none."""
    occurrence = np.bincount(near[near >= 0], minlength=len(near))
    skewness = float(skew(occurrence)) if np.ptp(occurrence) else 0.0
    return Hubness(skewness, float(np.mean(occurrence == 0)))
