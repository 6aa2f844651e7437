"""What an encoder is worth, in a sentence: of how many songs is the nearest other song by the same artist?

Leave-one-out over every song that has a partner: another recording by one of its artists or, where no artist has two,
of one of its genres. Near is as `evaluate` and `recommend` mean it: by the cosine of standardised vectors.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from simsiam_dali import scores
from simsiam_dali.evaluation import label_ids
from simsiam_dali.neighbours import unit
from simsiam_dali.splits import groups

BASELINES = {"untrained": "the untrained encoder", "mfcc": "MFCCs"}
"""What the trained encoder is compared with, as the sentence calls it."""
RESAMPLES = 2000
EQUAL = 1e-6
"""Cosines that differ by less are taken for equal: so much is float32's rounding."""
BLOCK = 256
"""Songs compared with all others at a time."""


def labels_of(songs: pd.DataFrame) -> tuple[str, list[list[int]]] | None:
    """What songs can share, "artist" or "genre", and each song's labels as numbers; None where none share any."""
    group = groups(songs, "song")
    for target in ("artist", "genre"):
        labels = label_ids(songs, target)
        recordings: dict[int, set[int]] = {}
        for own, recording in zip(labels, group.tolist(), strict=True):
            for label in own:
                recordings.setdefault(label, set()).add(recording)
        if any(len(own) > 1 for own in recordings.values()):
            return target, labels
    return None


def nearest_shares(vectors: np.ndarray, labels: Sequence[Sequence[int]], group: np.ndarray) -> np.ndarray:
    """Whether each song's nearest other song shares a label with it: `(N,)` float, NaN for a song without a partner.

    vectors `(N, D)` float; labels: each song's, at least one; group `(N,)` int: songs of one number are one recording,
    and never each other's neighbours. Of several equally near, all have to share it: a tie is no hit by chance, and an
    encoder that gives all songs one vector scores nothing.
    """
    x = unit(vectors)
    rows = np.repeat(np.arange(len(labels)), [len(own) for own in labels])
    columns = np.fromiter((label for own in labels for label in own), int, len(rows))
    table = csr_array((np.ones(len(rows), np.int32), (rows, columns)), shape=(len(labels), columns.max(initial=0) + 1))
    hit = np.full(len(x), np.nan)
    for start in range(0, len(x), BLOCK):
        block = slice(start, start + BLOCK)
        cosine = x[block] @ x.T
        other = group[block, None] != group
        shares = (table[block] @ table.T).toarray() > 0
        nearest_partner = np.where(other & shares, cosine, -np.inf).max(axis=1)
        nearest_stranger = np.where(other & ~shares, cosine, -np.inf).max(axis=1)
        scored = np.isfinite(nearest_partner)
        hit[block][scored] = nearest_partner[scored] > nearest_stranger[scored] + EQUAL
    return hit


def sentence(songs: pd.DataFrame, vectors: Mapping[str, np.ndarray], held_back_only: bool, drawn_from: int = 0) -> str:
    """The sentence; empty where no song has a partner.

    songs: rows with `artists`, `genres`, `title`, `duration` and `split`; vectors: name to `(N, D)`, first those that
    are judged, then any of `BASELINES`. held_back_only: ask for validation songs alone, since the others' tags were
    learned from. drawn_from: songs of the library of which these are a part; 0: they are all.
    """
    if (found := labels_of(songs)) is None:
        return ""
    target, labels = found
    labelled = np.array([bool(own) for own in labels])
    asked = labelled & (songs["split"] == "val").to_numpy() if held_back_only else labelled
    group = groups(songs, "song")[labelled]
    own = [labels[row] for row in np.flatnonzero(labelled)]
    hits = {name: nearest_shares(x[labelled], own, group)[asked[labelled]] for name, x in vectors.items()}
    first = next(iter(hits))
    scored = ~np.isnan(hits[first])
    if not scored.any():
        return ""
    share = scores.Metric(scores.mean, sign=1)
    found_by = {name: scores.score(share, (hit[scored],), RESAMPLES, seed=0) for name, hit in hits.items()}
    n, judged = int(scored.sum()), found_by[first]
    compared = [
        f"{round(n * found_by[name].value)} with {words} ({_difference(judged, found_by[name], n)})"
        for name, words in BASELINES.items()
        if name in found_by and name != first
    ]
    whose = f"{n:,} songs" + (" held back from the training" if held_back_only else "")
    if drawn_from:
        whose += f", drawn from {drawn_from:,}"
    same = "by the same artist" if target == "artist" else "of the same genre"
    return f"the nearest song is {same} for {round(n * judged.value)} of {whose}" + (
        f"; {', '.join(compared)}" if compared else ""
    )


def _difference(ours: scores.Score, theirs: scores.Score, n: int) -> str:
    low, high = (round(n * end) for end in scores.interval(ours.resampled - theirs.resampled))
    return f"{round(n * (ours.value - theirs.value)):+d}, 95% interval {low:+d} to {high:+d}"
