"""Which way of comparing songs finds more of a soundtrack? python benchmarks/real_music/retrieval.py ROW

Takes the tables that equal_time.py left in --work of one of its rows, or of a baseline, and finds each song's nearest
by other rules than that of `evaluate` and `recommend`, the cosine of vectors normalised within songs. mAP@10 and 5-NN
as there, with intervals over seeds and soundtracks of the differences from the cosine of standardised vectors; hubness
as `simsiam_dali.evaluate` reports it.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import equal_time
import equal_time_scores
import halves
import numpy as np
import run
from scipy.special import ndtr
from scipy.stats import zscore

from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.embedding.table import Embeddings, read_song_embeddings
from simsiam_dali.evaluation.hubness import of_neighbours
from simsiam_dali.evaluation.knn import half_whitened, l2_normalised, nearest, unit

PLAIN, TODAY = "cosine, standardised", "normalised within songs"
"""The rule that the others are compared with, and that of `evaluate` and `recommend`."""
SCALE_NEIGHBOUR = 7
"""Whose distance is a song's scale in local scaling (Zelnik-Manor and Perona, 2004, section 2)."""
LENGTH_WEIGHT = 0.5
"""Standard deviations of the length beside a vector of length 1."""


def whitened(vectors: np.ndarray, shrinkage: float) -> np.ndarray:
    """Principal components of standardised vectors, each divided by the root of its variance plus `shrinkage` means.

    The mean is that of all components' variances: 0 whitens fully, infinity not at all.
    """
    x = (vectors - vectors.mean(axis=0)) / vectors.std(axis=0).clip(min=1e-9)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    variance = s**2 / len(x)
    return u * s / np.sqrt(variance + shrinkage * variance.mean())


def mutual_proximity(similarity: np.ndarray) -> np.ndarray:
    """How likely it is that two songs are nearer to each other than a third, by normal distributions (JMLR 13:2871)."""
    others = np.ma.masked_array(similarity, np.eye(len(similarity), dtype=bool))
    mean, std = others.mean(axis=1).data, others.std(axis=1).data
    nearer = ndtr((similarity - mean[:, None]) / std[:, None])
    return nearer * nearer.T


def local_scaling(similarity: np.ndarray) -> np.ndarray:
    """A distance in units of both songs' distance to their 7th nearest song."""
    distance = 1 - similarity
    scale = np.sort(distance + np.diag(np.full(len(distance), np.inf)), axis=1)[:, SCALE_NEIGHBOUR - 1]
    return np.exp(-(distance**2) / np.outer(scale, scale))


def find_by(similarity: np.ndarray, cosine: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest others by a similarity `(N, N)`, and their cosines, by which neighbours vote whatever the rule."""
    others = similarity - np.diag(np.full(len(similarity), np.inf))
    near = np.argsort(-others, axis=1, kind="stable")[:, :k]
    return near, np.take_along_axis(cosine, near, axis=1)


def cosines(x: np.ndarray) -> np.ndarray:
    """`(N, N)`, of vectors `(N, D)` of length 1."""
    return x @ x.T


def by_cosine(x: np.ndarray, group: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """By the cosine of the vectors as they are."""
    x = l2_normalised(x)
    return nearest(x, x, k, (group, group))


def by(rule: Callable[[np.ndarray], np.ndarray]) -> run.Find:
    """By what a rule makes of the cosines of standardised vectors, both `(N, N)`."""

    def find(vectors: np.ndarray, _: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        cosine = cosines(unit(vectors, whiten=False))
        return find_by(rule(cosine), cosine, k)

    return find


@dataclass(frozen=True)
class Beside:
    """What else is known of the songs: MFCC statistics `(N, D)`, and the logarithm of their length in s `(N, 1)`."""

    mfcc: np.ndarray
    log_length: np.ndarray


def with_length(songs: Embeddings, beside: Beside) -> np.ndarray:
    """Vectors of length 1, and the length of a song beside them: what a number that hears nothing can add."""
    return np.hstack([unit(songs.vectors, whiten=False), LENGTH_WEIGHT * zscore(beside.log_length)])


@dataclass(frozen=True)
class Rule:
    """change: what of a table is searched."""

    find: run.Find
    change: Callable[[Embeddings, Beside], np.ndarray] = lambda songs, _: songs.vectors


RULES = {
    PLAIN: Rule(by_cosine, lambda songs, _: unit(songs.vectors, whiten=False)),
    TODAY: Rule(by_cosine, lambda songs, _: songs.unit()),
    "half-whitened": Rule(by_cosine, lambda songs, _: unit(songs.vectors)),
    "cosine": Rule(by_cosine),
    "cosine, centred": Rule(by_cosine, lambda songs, _: songs.vectors - songs.vectors.mean(axis=0)),
    "centred, half-whitened": Rule(
        by_cosine, lambda songs, _: half_whitened(songs.vectors - songs.vectors.mean(axis=0))
    ),
    "PCA-whitened, shrinkage 1": Rule(by_cosine, lambda songs, _: whitened(songs.vectors, 1)),
    "PCA-whitened, shrinkage 0.1": Rule(by_cosine, lambda songs, _: whitened(songs.vectors, 0.1)),
    "MFCC statistics beside it": Rule(
        by_cosine, lambda songs, own: np.hstack([unit(songs.vectors, whiten=False), unit(own.mfcc, whiten=False)])
    ),
    "the song's length beside it": Rule(by_cosine, with_length),
    "mutual proximity": Rule(by(mutual_proximity)),
    "local scaling": Rule(by(local_scaling)),
}


@dataclass(frozen=True)
class Row:
    """The tables of one row of equal_time.py. beside: half learned from -> what is known of the other half's songs.

    soundtracks: of each song, first of the one half's, then of the other's.
    """

    tables: dict[int, dict[str, Path]]
    beside: dict[str, Beside]
    soundtracks: np.ndarray

    @classmethod
    def open(cls, name: str, shards: halves.Shards, seeds: int) -> Self:
        """Raises UserError where a table is missing; those of baselines are computed where they are."""
        baseline = name in run.BASELINES
        if baseline and "untrained" not in run.BASELINES[name]:
            seeds = 1  # nothing in it is drawn
        tables: dict[int, dict[str, Path]] = {}
        for seed, half in itertools.product(range(seeds), halves.HALVES):
            if baseline:
                table = equal_time.baseline_table(name, half, shards, seed)
            else:
                job = next(job for job in equal_time.trainings(name, 1, seed) if job.trained_on == half)
                table = job.table(shards.folder / "equal-time", name)
                if not table.exists():
                    raise UserError(f"no {table}: train first with equal_time.py --rows '{name}'")
            tables.setdefault(seed, {})[half] = table
        mfcc = {half: equal_time.baseline_table("MFCC", half, shards) for half in halves.HALVES}
        soundtracks = np.concatenate([run.of_each_song(mfcc[half])["soundtrack/of"] for half in halves.HALVES])
        beside = {}
        for half, table in mfcc.items():
            songs = read_song_embeddings(table)
            beside[half] = Beside(songs.vectors, np.log(songs.table[["duration"]].to_numpy(float)))
        return cls(tables, beside, soundtracks)

    def vectors(self, rule: Rule, seed: int, half: str) -> np.ndarray:
        """What is searched."""
        return rule.change(read_song_embeddings(self.tables[seed][half]), self.beside[half])

    def scores(self, rule: Rule) -> dict[str, equal_time_scores.Scores]:
        """By a rule, as equal_time.py keeps them."""
        found: dict[str, equal_time_scores.Scores] = {}
        for seed, halves_of in self.tables.items():
            for half, table in halves_of.items():
                each = run.of_each_song(table, rule.find, self.vectors(rule, seed, half))
                own = {metric: each[metric].tolist() for metric in equal_time_scores.METRICS}
                found.setdefault(str(seed), {})[half] = own
        return found

    def hubness(self, rule: Rule) -> tuple[float, float]:
        """Means of the skewness of the 10-occurrence and of the share of anti-hubs: songs that are in no list of 10."""
        found = []
        for seed, half in ((seed, half) for seed, halves_of in self.tables.items() for half in halves_of):
            x = self.vectors(rule, seed, half)
            near, _ = rule.find(x, np.arange(len(x)), run.RETRIEVED)
            found.append(of_neighbours(near))
        return float(np.mean([each.skewness for each in found])), float(np.mean([each.never for each in found]))


def table_lines(rows: Sequence[Row]) -> Iterator[str]:
    """The Markdown table, over the songs of all sets together; each counts with the seeds that all of them have."""
    yield "| nearest by | 5-NN | | mAP@10 | | skewness of the 10-occurrence | anti-hubs |"
    yield "|---|---|---|---|---|---|---|"
    soundtracks = np.concatenate([row.soundtracks for row in rows])
    plain = [row.scores(RULES[PLAIN]) for row in rows]
    for name, rule in RULES.items():
        own, cells = [row.scores(rule) for row in rows], []
        for metric in equal_time_scores.METRICS:
            each, base = (_side_by_side(scores, metric) for scores in (own, plain))
            cells.append(f"{each.mean():.3f}")
            cells.append("" if name == PLAIN else equal_time_scores.shown(each - base, soundtracks))
        skewness, never = np.mean([row.hubness(rule) for row in rows], axis=0)
        yield f"| {name} | {' | '.join(cells)} | {skewness:.2f} | {never:.1%} |"


def _side_by_side(sets: Sequence[dict[str, equal_time_scores.Scores]], metric: str) -> np.ndarray:
    """`(seeds, songs)` of several sets."""
    found = [equal_time_scores.by_seed(scores, metric) for scores in sets]
    common = [seed for seed in found[0] if all(seed in own for own in found)]
    return np.stack([np.concatenate([own[seed] for own in found]) for seed in common])


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    rows = [*equal_time.CANDIDATES, *run.BASELINES]
    add("row", choices=rows, metavar="ROW", help=f"of equal_time.py, or one of {', '.join(run.BASELINES)}")
    add("--work", type=Path, default=Path("real_music"), metavar="DIR", help="as of equal_time.py")
    add(
        "--part",
        choices=equal_time.PARTS,
        nargs="+",
        default=["choose"],
        help="as of equal_time.py (default: choose); of several, all songs count together",
    )
    add("--seeds", type=int, default=5, metavar="N", help="how many there are (default: 5)")
    args = parser.parse_args()
    sets = [Row.open(args.row, equal_time.shards_of(part, args.work), args.seeds) for part in args.part]
    print("\n".join(table_lines(sets)))


if __name__ == "__main__":
    main()
