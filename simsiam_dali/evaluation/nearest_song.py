"""An encoder's quality in one sentence: for how many songs is the nearest other song by the same artist?

Leave-one-out over every song that has a partner: another recording by one of its artists or, where no artist has two,
of one of its genres. Nearest is as in `evaluate` and `recommend`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from simsiam_dali.evaluation.folds import groups
from simsiam_dali.evaluation.knn import cosine_blocks
from simsiam_dali.evaluation.metrics import Metric, interval, score
from simsiam_dali.evaluation.plan import all_label_ids, dependent_songs
from simsiam_dali.evaluation.probes import label_matrix

BASELINES = {"untrained": "the untrained encoder", "mfcc": "MFCCs"}
"""The features that the trained encoder is compared with, and how the sentence calls them."""
RESAMPLES = 2000
EQUAL = 1e-6
"""Cosines that differ by less count as equal: that is float32's rounding."""


def labels_of(songs: pd.DataFrame) -> tuple[str, list[list[int]]] | None:
    """The label that songs share, "artist" or "genre", and each song's labels as numbers; None where none share any."""
    group = groups(songs, "song")
    for target in ("artist", "genre"):
        labels = all_label_ids(songs, target)
        recordings = {(label, recording) for own, recording in zip(labels, group, strict=True) for label in own}
        if len(recordings) > len({label for label, _ in recordings}):
            return target, labels
    return None


def nearest_shares(x: np.ndarray, labels: Sequence[Sequence[int]], group: np.ndarray) -> np.ndarray:
    """Whether each song's nearest other song shares a label with it: `(N,)` float, NaN for a song without a partner.

    x: unit vectors `(N, D)`; labels: each song's, at least one; group `(N,)` int: songs with the same number are one
    recording, and never each other's neighbours. Of several equally near, all have to share it: a tie is not a hit by
    chance, and an encoder that maps all songs to one vector scores 0.
    """
    table = label_matrix(labels)
    hit = np.full(len(x), np.nan)
    for block, cosine in cosine_blocks(x, x):
        other = group[block, None] != group
        shares = (table[block] @ table.T).toarray() > 0
        nearest_partner = np.where(other & shares, cosine, -np.inf).max(axis=1)
        nearest_stranger = np.where(other & ~shares, cosine, -np.inf).max(axis=1)
        scored = np.isfinite(nearest_partner)
        hit[block][scored] = nearest_partner[scored] > nearest_stranger[scored] + EQUAL
    return hit


@dataclass(frozen=True)
class Counts:
    """Of `asked` songs, how many have a nearest song that shares their label, by each feature's name.

    label: "artist" or "genre". differences: the first feature's count minus another's, and its 95% interval (paired;
    bootstrap over artists, for genres over albums), in songs; the interval of too few of them is NaN.
    """

    label: str
    asked: int
    found: dict[str, int]
    differences: dict[str, tuple[float, float, float]]


def count(songs: pd.DataFrame, vectors: Mapping[str, np.ndarray], held_back_only: bool) -> Counts | None:
    """The counts; None where no song has a partner.

    songs: rows with `path`, `title`, `artists`, `albums`, `album_artist`, `genres`, `duration` and `split`; vectors:
    name to unit vectors `(N, D)`, first those that are judged. held_back_only: count validation songs alone, since the
    training saw the tags of the others.
    """
    if (known := labels_of(songs)) is None:
        return None
    label, labels = known
    rows = np.flatnonzero([bool(own) for own in labels])
    group = groups(songs, "song")[rows]
    asked = (songs["split"] == "val").to_numpy()[rows] | (not held_back_only)
    hits = {name: nearest_shares(x[rows], [labels[row] for row in rows], group)[asked] for name, x in vectors.items()}
    scored = ~np.isnan(next(iter(hits.values())))  # the same songs for all: labels and groups decide
    hits = {name: hit[scored] for name, hit in hits.items()}
    together = dependent_songs(songs, label, groups(songs, "album"))[rows][asked][scored]
    n = len(together)
    if not n:
        return None
    mean = Metric(np.mean, 1)
    scores = {name: score(mean, (hit,), together, RESAMPLES, seed=0) for name, hit in hits.items()}
    first = next(iter(scores.values()))
    differences = {}
    for name, other in scores.items():
        low, high = interval(first.resampled - other.resampled)
        differences[name] = n * (first.value - other.value), n * low, n * high
    return Counts(label, n, {name: round(n * s.value) for name, s in scores.items()}, differences)


def sentence(songs: pd.DataFrame, vectors: Mapping[str, np.ndarray], held_back_only: bool, drawn_from: int = 0) -> str:
    """`count` in words, with those of the `BASELINES` that `vectors` has; empty where there is nothing to count.

    drawn_from: size of the library that these songs are a sample of; 0: they are all of it.
    """
    counts = count(songs, vectors, held_back_only)
    if counts is None:
        return ""
    first, *others = counts.found
    compared = []
    for name in (name for name in BASELINES if name in others):
        more, *bounds = counts.differences[name]
        if any(map(math.isnan, bounds)):
            interval_said = f"too few {'artists' if counts.label == 'artist' else 'albums'} for an interval"
        else:
            interval_said = "95% interval {:+d} to {:+d}".format(*map(round, bounds))
        compared.append(f"{counts.found[name]} with {BASELINES[name]} ({round(more):+d}, {interval_said})")
    same = "by the same artist" if counts.label == "artist" else "of the same genre"
    whose = f"{counts.asked:,} songs" + (" held back from the training" if held_back_only else "")
    drawn = f", drawn from {drawn_from:,}" if drawn_from else ""
    line = f"the nearest song is {same} for {counts.found[first]} of {whose}{drawn}"
    return f"{line}; {', '.join(compared)}" if compared else line
