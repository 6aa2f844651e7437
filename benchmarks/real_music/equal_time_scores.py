"""The scores that `equal_time.py` keeps: differences with their intervals, and the table that is made of them."""

from collections.abc import Iterator, Mapping
from typing import Any

import halves
import numpy as np

BASE, PEER = "the recipe", "SimSiam of lightly's parts"
TAGGED = ("joint, 2.5 s noisy views of 60 s, windows", "contrastive, 2.5 s noisy views of 60 s, windows")
"""A recipe that learns from tags too, and the same without them."""
METRICS = ("soundtrack/knn", "soundtrack/map")
RESAMPLES = 4000


def interval(differences: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean of `(seeds, songs)` differences: seeds and songs are drawn anew, each as often as it is.

    A song's differences stay together in a resample, and so do a seed's: both are what another experiment would have
    other ones of (a two-way bootstrap: Owen 2007, doi:10.1214/07-AOAS122).
    """
    rng = np.random.default_rng(0)
    seeds, songs = differences.shape
    seed_weight = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    song_weight = rng.multinomial(songs, np.full(songs, 1 / songs), RESAMPLES) / songs
    means = ((seed_weight @ differences) * song_weight).sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


Scores = dict[str, dict[str, list[float]]]
"""Of one training seed: the half learned from -> metric -> the score of each song of the other half."""


def by_seed(row: Mapping[str, Scores], metric: str) -> dict[str, np.ndarray]:
    """Seed -> each song's score, for the seeds that have been trained from both halves."""
    whole = {seed: halves_of for seed, halves_of in row.items() if len(halves_of) == len(halves.HALVES)}
    return {seed: np.concatenate([own[half][metric] for half in halves.HALVES]) for seed, own in whole.items()}


def difference(row: Mapping[str, Scores], base: Mapping[str, Scores], metric: str) -> np.ndarray | None:
    """`(seeds, songs)`: the row's scores minus the recipe's, of the seeds that both have; None without any."""
    own, other = by_seed(row, metric), by_seed(base, metric)
    common = [seed for seed in own if seed in other]
    return np.stack([own[seed] - other[seed] for seed in common]) if common else None


def untagged_songs(doc: Mapping[str, Any]) -> np.ndarray:
    """Columns of `by_seed`'s scores that are of songs with neither artist nor album."""
    (first, *_) = (own for seeds in doc["scores"].values() for own in seeds.values() if "a" in own)
    return np.concatenate([doc["untagged"]["a"], np.add(doc["untagged"]["b"], len(first["a"][METRICS[0]]))]).astype(int)


def table_lines(doc: Mapping[str, Any]) -> Iterator[str]:
    """The Markdown table."""
    scored = {row: own for row, own in doc["scores"].items() if by_seed(own, METRICS[0])}
    untagged = untagged_songs(doc)
    yield f"| | epochs | seeds | 5-NN | | mAP@10 | | mAP@10 of {len(untagged)} untagged songs | |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row, own in scored.items():
        cells = [str(doc["epochs"][row]), str(len(by_seed(own, METRICS[0])))]
        for metric, columns in ((METRICS[0], slice(None)), (METRICS[1], slice(None)), (METRICS[1], untagged)):
            cells.append(f"{np.mean([each[columns] for each in by_seed(own, metric).values()]):.3f}")
            gap = None if row == BASE else difference(own, doc["scores"][BASE], metric)
            gap = None if gap is None else gap[:, columns]
            cells.append("" if gap is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(gap.mean(), *interval(gap)))
        yield f"| {row} | {' | '.join(cells)} |"
    for name, own_scores in doc.get("baselines", {}).items():
        yield f"| {name} | | | {own_scores[METRICS[0]]:.3f} | | {own_scores[METRICS[1]]:.3f} | | | |"


def peer_lines(doc: Mapping[str, Any]) -> Iterator[str]:
    """Each candidate's differences from the peer."""
    if PEER not in doc["scores"]:
        return
    for row, own in doc["scores"].items():
        gaps = [difference(own, doc["scores"][PEER], metric) for metric in METRICS]
        if row in (BASE, PEER) or any(gap is None for gap in gaps):
            continue
        shown = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(gap.mean(), *interval(gap)) for gap in gaps if gap is not None]
        yield f"- {row}, to {PEER}: 5-NN {shown[0]}, mAP@10 {shown[1]}"


def tag_lines(doc: Mapping[str, Any]) -> Iterator[str]:
    """What the tags add, on all songs, on those that carry tags, and on those that do not."""
    gaps = [difference(*(doc["scores"].get(row, {}) for row in TAGGED), metric) for metric in METRICS]
    if any(gap is None for gap in gaps):
        return
    untagged = np.isin(np.arange(gaps[0].shape[1]), untagged_songs(doc)) if gaps[0] is not None else np.array([])
    groups = {"songs": untagged | ~untagged, "songs with tags": ~untagged, "songs without tags": untagged}
    for name, songs in groups.items():
        own = [gap[:, songs] for gap in gaps if gap is not None]
        shown = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(gap.mean(), *interval(gap)) for gap in own]
        yield f"- what the tags add, joint to contrastive, {songs.sum()} {name}: 5-NN {shown[0]}, mAP@10 {shown[1]}"


def page_lines(doc: Mapping[str, Any]) -> Iterator[str]:
    """The table, and what it is of."""
    songs = len(next(iter(by_seed(doc["scores"][BASE], METRICS[0]).values())))
    env = doc["environment"]
    yield from table_lines(doc)
    yield ""
    if compared := [*peer_lines(doc), *tag_lines(doc)]:
        yield from compared
        yield ""
    yield (
        f"{songs} songs; the time of {doc['base_epochs']} epochs of the recipe; {env['cpu']}, {env['cores']} cores;"
        f" {env['date']}, commit {env['commit']}."
    )
