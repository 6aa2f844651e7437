"""Do recipes hold on soundtracks that nobody looked at? benchmarks/real_music/held_out.py --rows ROW ... --json FILE

A third set (fetch.sh --held-out) was listed when the recipes were fixed, and nothing was trained or chosen on it. The
encoders that equal_time.py trained for its report, of every seed and half, embed its songs of 30 s or more, and their
nearest songs are scored as there. So neither the songs nor their soundtracks were heard in training, and no tag of
theirs was seen: what an encoder learned from the tags of others counts only if it carries over.

FILE holds the scores of every song by every encoder. Its table stands in docs/experiments.md (tables.py --write).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equal_time
import halves
import numpy as np
import run
import torch
from equal_time_scores import BASE, METRICS, Scores, page_lines

sys.path.append(str(Path(__file__).resolve().parents[1]))
import machine

from simsiam_dali.common.errors import UserError, one_line_errors


def prepare(work: Path, music: Path) -> Path:
    """Fetch and pack the set, whatever of it is not there yet; returns its shards, in segments as the others have."""
    halves.fetch(halves.HELD_OUT, music)
    shards = work / "held-out"
    if not (shards / "manifest.json").exists():
        halves.pack(music, shards, halves.SEGMENT_SECONDS, halves.HELD_OUT.least_seconds)
    return shards


def tables(row: str, work: Path, shards: Path, seeds: Sequence[int]) -> dict[str, Path]:
    """Encoder, by its seed and the half it learned from, to its table of the songs, made where it is not there yet."""
    made = {}
    for job in (job for seed in seeds for job in equal_time.trainings(row, 1, seed)):
        name = f"{halves.slug(row)}-{job.trained_on}-{job.seed}"
        table, trained = work / "held-out-tables" / f"{name}.parquet", work / "equal-time" / "runs" / name
        if not table.exists():
            if not (trained / "checkpoint.pt").exists():
                raise UserError(f"no {trained}: train first with equal_time.py --part report --rows '{row}'")
            table.parent.mkdir(exist_ok=True)
            words = ["--checkpoint", trained, "--shards", shards, "--out", table]
            halves.python(["-m", "simsiam_dali.embed", *words])
        made[f"{job.seed}{job.trained_on}"] = table
    return made


def baseline(feature: str, work: Path, shards: Path, seed: int, half: str) -> Path:
    """The table of a baseline's features; untrained: the encoder that the recipe's training of this seed began with."""
    table = work / "held-out-tables" / f"{feature}-{half}-{seed}.parquet"
    if not table.exists():
        trained = work / "equal-time" / "runs" / f"{halves.slug(BASE)}-{half}-{seed}"
        words = ["--checkpoint", trained, "--shards", shards, "--features", feature, "--out", table]
        halves.python(["-m", "simsiam_dali.embed", *words])
    return table


def in_two(scores: np.ndarray) -> dict[str, list[Any]]:
    """The songs' scores in two parts under the halves' names, as equal_time_scores.py reads them."""
    return dict(zip(halves.HALVES, [part.tolist() for part in np.array_split(scores, 2)], strict=True))


def scores_of(made: dict[str, Path]) -> dict[str, Scores]:
    """Encoder to the scores of each song."""
    found: dict[str, Scores] = {}
    for encoder, table in made.items():
        each = run.of_each_song(table)
        parts = {metric: in_two(each[metric].round(4)) for metric in METRICS}
        found[encoder] = {half: {metric: parts[metric][half] for metric in METRICS} for half in halves.HALVES}
    return found


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--rows",
        nargs="+",
        choices=list(equal_time.CANDIDATES),
        metavar="ROW",
        required=True,
        help="rows of the report",
    )
    add("--report", type=Path, required=True, metavar="FILE", help="what equal_time.py --part report wrote")
    add("--json", type=Path, required=True, metavar="FILE", help="write the scores here")
    add(
        "--work",
        type=Path,
        default=Path("real_music"),
        metavar="DIR",
        help="as of equal_time.py (default: %(default)s)",
    )
    add("--music", type=Path, metavar="DIR", help="where the third set is, or goes (default: in --work)")
    args = parser.parse_args()
    report, work = json.loads(args.report.read_text()), args.work.resolve() / "report"
    shards = prepare(work, (args.music or work / "held-out-music").resolve())
    doc = {name: report[name] for name in ("base_epochs", "epochs")} | {"scores": {}, "baselines": {}}
    for row in dict.fromkeys([BASE, *args.rows]):
        doc["scores"][row] = scores_of(tables(row, work, shards, sorted(map(int, report["scores"][row]))))
    first = run.of_each_song(next(iter(tables(BASE, work, shards, [0]).values())))
    doc["soundtracks"] = in_two(first["soundtrack/of"])
    doc["untagged"] = {half: np.flatnonzero(own).tolist() for half, own in in_two(first["soundtrack/untagged"]).items()}
    for feature, name in run.BASELINES.items():
        seeds = sorted(map(int, report["scores"][BASE])) if feature == "untrained" else [0]
        # The two halves' trainings of a seed begin with the same weights, but have their own log-mel statistics.
        each = halves.HALVES if feature == "untrained" else halves.HALVES[:1]
        made = {f"{seed}{half}": baseline(feature, work, shards, seed, half) for seed in seeds for half in each}
        doc["baselines"][name] = scores_of(made)
    doc["environment"] = machine.environment(torch.device("cpu"))
    equal_time.write(doc, args.json)
    print("\n".join(page_lines(doc)))


if __name__ == "__main__":
    main()
