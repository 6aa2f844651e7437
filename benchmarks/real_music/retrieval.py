"""Which way of comparing songs finds more of a soundtrack? python benchmarks/real_music/retrieval.py ROW

Takes the tables that equal_time.py left in --work of one of its rows, and finds each song's nearest by other rules than
today's, the cosine of standardised vectors. mAP@10 and 5-NN as there, with intervals over seeds and songs of the
differences from today's rule; hubness as `simsiam_dali.evaluate` reports it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import equal_time
import numpy as np
import run
from scipy.special import ndtr
from scipy.stats import skew

from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.evaluation.knn import nearest_others, unit

TODAY = "cosine, standardised"
SCALE_NEIGHBOUR = 7
"""Whose distance is a song's scale in local scaling (Zelnik-Manor and Perona, 2004, section 2)."""


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


def find_by(similarity: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest others by a similarity `(N, N)`."""
    others = similarity - np.diag(np.full(len(similarity), np.inf))
    near = np.argsort(-others, axis=1, kind="stable")[:, :k]
    return near, np.take_along_axis(others, near, axis=1)


def by_cosine(vectors: np.ndarray, standardise: bool = True) -> np.ndarray:
    """`(N, N)`."""
    x = unit(vectors, standardise)
    return x @ x.T


RULES: dict[str, run.Find] = {
    TODAY: nearest_others,
    "cosine": lambda x, own, k: nearest_others(x, own, k, standardise=False),
    "cosine, centred": lambda x, own, k: nearest_others(x - x.mean(axis=0), own, k, standardise=False),
    "PCA-whitened, shrinkage 1": lambda x, own, k: nearest_others(whitened(x, 1), own, k, standardise=False),
    "PCA-whitened, shrinkage 0.1": lambda x, own, k: nearest_others(whitened(x, 0.1), own, k, standardise=False),
    "mutual proximity": lambda x, _, k: find_by(mutual_proximity(by_cosine(x)), k),
    "local scaling": lambda x, _, k: find_by(local_scaling(by_cosine(x)), k),
}


def scores(row: str, folder: Path, seeds: int, find: run.Find) -> dict[str, equal_time.Scores]:
    """The row's scores by a rule, as equal_time.py keeps them."""
    found: dict[str, equal_time.Scores] = {}
    for seed in range(seeds):
        for job in equal_time.trainings(row, 1, seed):
            if not (table := job.table(folder, row)).exists():
                raise UserError(f"no {table}: train first with equal_time.py --rows '{row}'")
            each = run.of_each_song(table, find)
            own = {metric: each[metric].tolist() for metric in equal_time.METRICS}
            found.setdefault(str(seed), {})[job.trained_on] = own
    return found


def hubs(row: str, folder: Path, seeds: int, find: run.Find) -> tuple[float, float]:
    """Mean skewness of the 10-occurrence, and mean share of songs that are nobody's neighbour."""
    found = []
    for seed in range(seeds):
        for job in equal_time.trainings(row, 1, seed):
            vectors = run.read_song_embeddings(job.table(folder, row)).vectors
            near, _ = find(vectors, np.arange(len(vectors)), run.RETRIEVED)
            occurrence = np.bincount(near.ravel(), minlength=len(vectors))
            found.append((skew(occurrence), np.mean(occurrence == 0)))
    skewness, never = np.mean(found, axis=0)
    return float(skewness), float(never)


def table_lines(row: str, folder: Path, seeds: int) -> Iterator[str]:
    """The Markdown table."""
    yield "| nearest by | 5-NN | | mAP@10 | | skewness | nobody's neighbour |"
    yield "|---|---|---|---|---|---|---|"
    today = scores(row, folder, seeds, RULES[TODAY])
    for name, find in RULES.items():
        own, cells = scores(row, folder, seeds, find), []
        for metric in equal_time.METRICS:
            gap = equal_time.difference(own, today, metric)
            assert gap is not None
            cells.append(f"{np.mean([*equal_time.by_seed(own, metric).values()]):.3f}")
            low, high = equal_time.interval(gap)
            cells.append("" if name == TODAY else f"{gap.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
        skewness, never = hubs(row, folder, seeds, find)
        yield f"| {name} | {' | '.join(cells)} | {skewness:.2f} | {never:.1%} |"


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("row", choices=list(equal_time.CANDIDATES), metavar="ROW", help="a row of equal_time.py")
    add("--work", type=Path, default=Path("real_music"), metavar="DIR", help="as of equal_time.py")
    parser.add_argument(
        "--part", choices=["choose", "report"], default="choose", help="of soundtracks (default: choose)"
    )
    add("--seeds", type=int, default=5, metavar="N", help="how many there are (default: 5)")
    args = parser.parse_args()
    print("\n".join(table_lines(args.row, args.work / args.part / "equal-time", args.seeds)))


if __name__ == "__main__":
    main()
