"""Does it learn? Real music, one command, one table: python benchmarks/real_music/run.py

Fetches the soundtracks of eleven free games (fetch.sh), packs them in two halves, trains on one half of each
soundtrack's songs and embeds the other, then the other way round: no song was heard in training. Scores are of each
song among the others of its half, by the cosine of embeddings normalised within songs: the vote of its 5 nearest
(accuracy) and mAP@10, for its soundtrack and its artist. Beside SimSiam stand the baselines (mean and std of MFCCs and
of the log-mel, and the untrained encoder), SimSiam built from lightly's parts on the same backbone, views and steps,
and the encoder that learns from tags.

Everything stays in --work; the same command continues where it was stopped.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import halves
import numpy as np
import torch
from equal_time_scores import UNTRAINED_STAGES, interval

sys.path.append(str(Path(__file__).resolve().parents[1]))
import machine

from simsiam_dali.common.distributed import choose_device
from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.config.load import load_config
from simsiam_dali.embedding.table import Embeddings, read_song_embeddings
from simsiam_dali.evaluation import knn, probes
from simsiam_dali.evaluation.plan import all_label_ids

NEIGHBOURS, RETRIEVED = 5, 10
TARGETS = ("soundtrack", "artist")

OURS, STAGES, PROJECTION, PEER, SIMPLE = (
    "SimSiam",
    "SimSiam, embedded by stages",
    "SimSiam, its projection",
    "SimSiam of lightly's parts",
    "simple (from tags)",
)
BASELINES = {
    "untrained encoder": ("--features", "untrained", "--embedding", "backbone"),
    "MFCC": ("--features", "mfcc"),
    "log-mel": ("--features", "log-mel"),
    UNTRAINED_STAGES: ("--features", "untrained", "--embedding", "stages"),
}
"""What a baseline is called, and the options of `simsiam_dali.embed` that make its table."""
ORDER = (OURS, STAGES, PROJECTION, PEER, SIMPLE, *BASELINES)


def plan(seeds: int) -> Iterator[halves.Job]:
    """The trainings behind the table: first one of each of the two to compare, and last the one that has tags."""
    ours, theirs, tagged = [], [], []
    for seed in range(seeds):
        for half in halves.HALVES:
            tables: dict[str, tuple[str, ...]] = {
                OURS: ("--embedding", "backbone"),
                STAGES: ("--embedding", "stages"),
                PROJECTION: ("--embedding", "projection"),
            }
            # In those without an encoder nothing is drawn.
            tables |= {name: how for name, how in BASELINES.items() if seed == 0 or "untrained" in how}
            ours.append(halves.Job(OURS, "simsiam", half, seed, {}, tables))
            theirs.append(halves.Job(PEER, "lightly", half, seed, {}, {PEER: ()}))
            if seed == 0:  # shown the tags it is asked for, it is no rival: one is enough to see where it stands
                tagged.append(halves.Job(SIMPLE, "simple", half, seed, {}, {SIMPLE: ()}))
    one = len(halves.HALVES)
    yield from (*ours[:one], *theirs[:one], *ours[one:], *theirs[one:], *tagged)


Find = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""As `knn.nearest_others`: of vectors `(N, D)`, none of a row's own group, the k nearest rows and their similarity."""


SEARCHES: dict[str, Callable[[Embeddings], np.ndarray]] = {
    "normalised within songs": Embeddings.unit,
    "half-whitened": lambda songs: knn.unit(songs.vectors),
}
"""How songs are compared: the rule of `evaluate` and `recommend`, and that of tables that know of no segments."""


def of_each_song(
    table: Path, find: Find = knn.nearest_others, vectors: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """`soundtrack/knn`, `soundtrack/map`, and so for artist: the score of each song that can be scored, in order.

    `soundtrack/of`: its soundtrack. `soundtrack/untagged`: whether it has neither artist nor album. vectors `(N, D)`:
    instead of the table's unit vectors.
    """
    songs = read_song_embeddings(table)
    vectors = songs.unit() if vectors is None else vectors
    rows = songs.table.assign(albums=songs.table["path"].map(lambda path: [halves.soundtrack(path)]))
    names = {name: i for i, name in enumerate(dict.fromkeys(own for (own,) in rows["albums"]))}
    labels = {"soundtrack": [[names[own]] for (own,) in rows["albums"]], "artist": all_label_ids(rows, "artist")}
    tags = zip(all_label_ids(songs.table, "artist"), all_label_ids(songs.table, "album"), strict=True)
    untagged = np.array([not artists and not albums for artists, albums in tags])
    soundtracks = np.array([own for (own,) in rows["albums"]])
    found = {}
    for target in TARGETS:
        labelled = np.flatnonzero([bool(own) for own in labels[target]])
        each = np.arange(len(labelled))  # leave out the song itself, and no other
        own = [labels[target][row] for row in labelled]
        first = np.array([ids[0] for ids in own])
        near, cosine = find(vectors[labelled], each, RETRIEVED)
        retrieval = probes.Retrieval(own, each, RETRIEVED)
        vote = knn.vote(first, near[:, :NEIGHBOURS], cosine[:, :NEIGHBOURS])
        found[f"{target}/knn"] = (vote == first)[retrieval.scored].astype(float)
        found[f"{target}/map"] = retrieval.average_precision(near)
        found[f"{target}/untagged"] = untagged[labelled][retrieval.scored]
        found[f"{target}/of"] = soundtracks[labelled][retrieval.scored]
    return found


Scores = dict[int, dict[str, dict[str, np.ndarray]]]
"""Of one row: seed to half (the one learned from) to the scores of the other half's songs."""


def by_row(jobs: Sequence[halves.Job], folder: Path) -> dict[str, Scores]:
    """The scores of each row; a seed counts when it has been trained on every half."""
    tables: dict[str, dict[int, dict[str, Path]]] = {}
    for job in jobs:
        for row in job.tables:
            tables.setdefault(row, {}).setdefault(job.seed, {})[job.trained_on] = job.table(folder, row)
    found: dict[str, Scores] = {}
    for row, seeds in tables.items():
        done = {seed: own for seed, own in seeds.items() if all(map(Path.exists, own.values()))}
        if done:
            found[row] = {seed: {half: of_each_song(p) for half, p in own.items()} for seed, own in done.items()}
    return found


def matrix(row: Scores, name: str) -> np.ndarray:
    """`(seeds, songs)`: first the songs of one half, then of the other."""
    return np.stack([np.concatenate([seed[half][name] for half in halves.HALVES]) for seed in row.values()])


def gaps(row: Scores, other: Scores, name: str) -> np.ndarray:
    """`(seeds, songs)`: the row's scores minus the other's by the same seed, or by the only one that it has."""
    own, base = matrix(row, name), matrix(other, name)
    if len(base) == 1 and len(own) > 1:  # a baseline in which nothing is drawn
        return own - base
    common = [seed for seed in row if seed in other]
    return matrix({seed: row[seed] for seed in common}, name) - matrix({seed: other[seed] for seed in common}, name)


def document(found: Mapping[str, Scores], against: Sequence[str], device: torch.device) -> dict[str, Any]:
    """What --json writes: of each row its scores, and their paired differences from the rows `against`.

    The intervals are over seeds and soundtracks, as those of equal_time.py.
    """
    names = [f"{target}/{kind}" for target in TARGETS for kind in ("knn", "map")]
    first = next(iter(found.values()))
    soundtracks = {target: matrix(first, f"{target}/of")[0] for target in TARGETS}
    rows: dict[str, Any] = {}
    for row, seeds in found.items():
        rows[row] = {}
        for name in names:
            of = soundtracks[name.partition("/")[0]]
            own = matrix(seeds, name)
            low, high = interval(own, of)
            compared = {}
            for other in against:
                if other != row and other in found:
                    gap = gaps(seeds, found[other], name)
                    bounds = interval(gap, of)
                    compared[other] = {"difference": float(gap.mean()), "low": bounds[0], "high": bounds[1]}
            each_seed = {str(seed): float(score) for seed, score in zip(seeds, own.mean(axis=1), strict=True)}
            rows[row][name] = {
                "value": float(own.mean()), "low": low, "high": high, "seeds": each_seed, "against": compared
            }  # fmt: skip
    return {
        "environment": machine.environment(device),
        "songs": {target: matrix(first, f"{target}/map").shape[1] for target in TARGETS},
        "rows": rows,
    }


def table_lines(doc: Mapping[str, Any]) -> Iterator[str]:
    """The Markdown table."""
    yield "| | soundtrack 5-NN | soundtrack mAP@10 | artist 5-NN | artist mAP@10 |"
    yield "|---|---|---|---|---|"
    names = [f"{target}/{kind}" for target in TARGETS for kind in ("knn", "map")]
    for row in sorted(doc["rows"], key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        cells = []
        for name in names:
            score = doc["rows"][row][name]
            each = [f"{value:.3f}" for value in score["seeds"].values()]
            spread = f" ({', '.join(each)})" if len(each) > 1 else ""
            cells.append(f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]{spread}")
        yield f"| {row} | {' | '.join(cells)} |"


def verdict_lines(doc: Mapping[str, Any]) -> Iterator[str]:
    """How SimSiam compares with each baseline and to the peer."""
    rows = doc["rows"]
    for name, said in (("soundtrack/knn", "soundtrack 5-NN"), ("soundtrack/map", "soundtrack mAP@10")):
        best = max((row for row in BASELINES if row in rows), key=lambda row: rows[row][name]["value"])
        for other, what in ((best, "the best baseline, "), (PEER, "")):
            if gap := rows[OURS][name]["against"].get(other):
                yield f"{said}: {gap['difference']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}] to {what}{other}"


def environment_line(doc: Mapping[str, Any]) -> str:
    """What it was measured on, and what the command took from fetching to the table."""
    env, took = doc["environment"], doc["took"]
    songs = ", ".join(f"{n} songs by {target}" for target, n in doc["songs"].items())
    where = env["gpu"] or f"{env['cpu']}, {env['cores']} cores"
    work = f"{took['minutes']:.0f} min for {took['trainings']} of {took['of']} trainings"
    return f"{songs}; {where}; {work}; {env['date']}, commit {env['commit']}."


def page_lines(doc: Mapping[str, Any]) -> Iterator[str]:
    """What the command prints, as Markdown."""
    yield from table_lines(doc)
    yield ""
    yield from (f"- {line}" for line in verdict_lines(doc))
    yield ""
    yield environment_line(doc)


def add_places(parser: argparse.ArgumentParser) -> None:
    """Where everything lies, and the device."""
    add = parser.add_argument
    add(
        "--work",
        type=Path,
        default=Path("real_music"),
        metavar="DIR",
        help="everything is kept here (default: %(default)s)",
    )
    add("--music", type=Path, metavar="DIR", help="where fetch.sh puts the music (default: WORK/music)")
    add("--device", choices=["auto", "cpu", "gpu"], default="auto", help="auto takes the GPU when there is one")
    add("--json", type=Path, metavar="FILE", help="write the result here")


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options that run.py and equal_time.py share."""
    add_places(parser)
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="YAML settings (default: configs/real_music_gpu.yaml or _cpu.yaml)")
    add("--jobs", type=int, metavar="N", help="trainings side by side (default: one for each core; 1 on a GPU)")


def common(args: argparse.Namespace) -> tuple[torch.device, Path, int]:
    """(device, config file, trainings side by side) that the options mean."""
    device = choose_device(args.device)
    kind = "gpu" if device.type == "cuda" else "cpu"
    config = args.config or halves.ROOT / "configs" / f"real_music_{kind}.yaml"
    load_config(config)  # refused before anything is fetched
    return device, config.resolve(), args.jobs or (1 if kind == "gpu" else len(os.sched_getaffinity(0)))


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="trainings of SimSiam and its peer on each half (default: 3)"
    )
    parser.add_argument(
        "--encoders", nargs="+", choices=["simsiam", "lightly", "simple"], default=["simsiam", "lightly", "simple"],
        metavar="TYPE",
        help="which to train, of simsiam, lightly and simple (default: all); the table has what is there",
    )  # fmt: skip
    args = parser.parse_args()
    if "lightly" in args.encoders and find_spec("lightly") is None:
        raise UserError("the peer needs lightly: pip install lightly, or leave it out with --encoders simsiam simple")
    device, config, side_by_side = common(args)
    work = args.work.resolve()
    started = time.perf_counter()
    shards = halves.prepare(work, (args.music or work / "music").resolve())
    jobs = list(plan(args.seeds))
    wanted = [job for job in jobs if job.kind in args.encoders]
    trained = halves.run_all(wanted, shards, work, config, device, side_by_side)
    doc = document(by_row(jobs, work), [*BASELINES, PEER], device)
    doc["took"] = {"trainings": trained, "of": len(wanted), "minutes": (time.perf_counter() - started) / 60}
    if args.json:
        args.json.write_text(json.dumps(doc, indent=1) + "\n")
    print("\n".join(page_lines(doc)))


if __name__ == "__main__":
    main()
