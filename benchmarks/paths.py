"""Steps of `recommend --path` beside those of naive interpolation: python benchmarks/paths.py --embeddings FILE

Also the steps of `--radio`, beside those of a random order; and with --made N, instead of a table, the seconds that a
path and each next song of a radio take with N made vectors.

Between pairs of songs drawn at random, paths of `--count` songs. The naive path takes, at each of the evenly spaced
points of the great circle between the two, the nearest recording that it has not taken yet. A step is the angle
between the embeddings of two songs in a row, as `recommend` compares them. The naive path knows nothing of artists;
so the path is measured both with the library's artists, of whom no two follow each other, and without.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch

from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.embedding.table import read_song_embeddings
from simsiam_dali.evaluation.knn import l2_normalised
from simsiam_dali.recommendation.library import Library
from simsiam_dali.recommendation.path import song_path, waypoints
from simsiam_dali.recommendation.radio import radio

RADIO_SONGS = 25
MADE_WIDTH = 512  # as of a ResNet-18
MADE_TIMES = 10
NAIVE, PATH, VARIED = "naive", "path", "path, artists varied"


def naive_path(x: np.ndarray, ends: tuple[int, int], count: int, recording: np.ndarray) -> list[int]:
    """The nearest unused recording to each of the evenly spaced points between two songs; x: unit vectors `(N, D)`."""
    start, end = ends
    rows, free = [start], ~np.isin(recording, recording[[start, end]])
    for point in waypoints(x[start], x[end], count - 2):
        rows.append(int(np.where(free, x @ point, -np.inf).argmax()))
        free &= recording != recording[rows[-1]]
    return [*rows, end]


def steps(x: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """Angles in degrees between songs in a row, `(len(rows) - 1,)`."""
    return np.rad2deg(np.arccos((x[rows[1:]] * x[rows[:-1]]).sum(axis=1).clip(-1, 1)))


def measure(table: Path, pairs: int, count: int, seed: int) -> dict[str, Any]:
    """Mean and largest step of each kind of path, and how many pairs' paths are better than the naive one."""
    songs = read_song_embeddings(table)
    library, x = Library(songs.table, Path()), songs.unit()
    if len(library) < count:
        raise UserError(f"{table} has {len(library)} songs, and a path --count {count}")
    rng, everything = np.random.default_rng(seed), np.ones(len(library), bool)
    found: dict[str, list[np.ndarray]] = {NAIVE: [], PATH: [], VARIED: []}
    while len(found[NAIVE]) < pairs:
        start, end = rng.choice(len(library), 2, replace=False).tolist()
        if library.recording[start] == library.recording[end]:
            continue
        found[NAIVE].append(steps(x, naive_path(x, (start, end), count, library.recording)))
        for kind, artists in ((PATH, [[] for _ in library.artists]), (VARIED, library.artists)):
            rows = song_path(x, (start, end), count, everything, library.recording, artists)
            found[kind].append(steps(x, rows))
    radio_steps, random_steps = [], []
    for start in rng.choice(len(library), min(pairs, len(library)), replace=False).tolist():
        order = radio(x, start, seed, everything, library.recording, library.artists)
        radio_steps.append(steps(x, list(itertools.islice(order, RADIO_SONGS))))
        random_steps.append(steps(x, rng.choice(len(library), RADIO_SONGS, replace=False).tolist()))
    mean = {kind: np.array([step.mean() for step in own]) for kind, own in found.items()}
    largest = {kind: np.array([step.max() for step in own]) for kind, own in found.items()}
    return {
        "songs": len(library),
        "pairs": pairs,
        "count": count,
        "seed": seed,
        "degrees": {
            kind: {
                "mean_step": float(mean[kind].mean()),
                "largest_step": float(largest[kind].mean()),
                "pairs_with_a_smaller_mean": int((mean[kind] < mean[NAIVE]).sum()),
                "pairs_with_a_smaller_largest": int((largest[kind] < largest[NAIVE]).sum()),
            }
            for kind in found
        },
        "radio_degrees": {
            "songs": RADIO_SONGS,
            "mean_step": float(np.mean(radio_steps)),
            "mean_step_of_a_random_order": float(np.mean(random_steps)),
        },
    }


def measure_made(songs: int, count: int, seed: int) -> dict[str, Any]:
    """Seconds of paths and of radios among made vectors of `MADE_WIDTH` numbers, 12 songs to an artist."""
    rng = np.random.default_rng(seed)
    x = l2_normalised(rng.standard_normal((songs, MADE_WIDTH), dtype=np.float32))
    recording, allowed = np.arange(songs), np.ones(songs, bool)
    artists = [[f"artist {row // 12}"] for row in range(songs)]
    paths, first, following = [], [], []
    for _ in range(MADE_TIMES):
        start, end = rng.choice(songs, 2, replace=False).tolist()
        began = time.perf_counter()
        song_path(x, (start, end), count, allowed, recording, artists)
        paths.append(time.perf_counter() - began)
        order = radio(x, start, seed, allowed, recording, artists)
        times = [time.perf_counter()]
        for _ in itertools.islice(order, RADIO_SONGS):
            times.append(time.perf_counter())
        took = np.diff(times)
        first.append(took[:2].sum())  # the start itself costs nothing
        following += took[2:].tolist()
    times_s = {"path": paths, "radio_first": first, "radio_next": following}
    return {"songs": songs, "width": MADE_WIDTH, "count": count} | {
        name: {"median_seconds": float(np.median(own)), "max_seconds": float(np.max(own))}
        for name, own in times_s.items()
    }


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="paths.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--embeddings", type=Path, metavar="FILE", help="table of songs")
    source.add_argument("--made", type=int, metavar="N", help="made vectors instead, for the time that it takes")
    add("--pairs", type=int, default=100, metavar="N", help="pairs of songs (default: %(default)s)")
    add("--count", type=int, default=12, metavar="N", help="songs of a path (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the pairs (default: %(default)s)")
    add("--json", type=Path, metavar="F", help="write the results here")
    args = parser.parse_args()
    if args.made:
        result = measure_made(args.made, args.count, args.seed)
        for name in ("path", "radio_first", "radio_next"):
            own = result[name]
            print(f"{name:12} {own['median_seconds']:.3f} s, at most {own['max_seconds']:.3f} s")
    else:
        result = measure(args.embeddings, args.pairs, args.count, args.seed)
        print(f"radio: {result['radio_degrees']}")
    for kind, own in result.get("degrees", {}).items():
        print(
            f"{kind:20} mean step {own['mean_step']:5.1f}°, largest {own['largest_step']:5.1f}°; below the naive path's"
            f" for {own['pairs_with_a_smaller_mean']} and {own['pairs_with_a_smaller_largest']} of {args.pairs} pairs"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"environment": machine.environment(torch.device("cpu")), **result}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
