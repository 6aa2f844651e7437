"""What does a training as it is shipped learn? python benchmarks/real_music/shipped.py --json FILE

The first two commands of the README without further settings: songs are packed by `tools/make_shards.py`, and the
encoder is trained by configs/cpu.yaml, on a GPU by configs/gpu.yaml, for as long as that takes. Encoders of three sets
of soundtracks embed the songs of the one that is left, whose soundtracks they have not heard: the songs and the scores
of `equal_time.py --part unheard`.

FILE holds the scores of every song: the same command continues where it was stopped.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import equal_time
import equal_time_scores
import halves
import numpy as np
import run
from equal_time_scores import METRICS, STAGES, by_seed, difference, for_every_seed, newest, shown

from simsiam_dali.common.distributed import choose_device
from simsiam_dali.common.errors import UserError, one_line_errors

SETTINGS: dict[str, object] = {"mlflow.enabled": False, "train.closing_score": False}
"""Over the config: neither changes what is learned."""


def prepare(work: Path, music: Path) -> halves.Shards:
    """Fetch all sets, and pack what is not there yet: what is learned from, as a user would."""
    sets = halves.prepare_sets(work / equal_time.UNHEARD, music)
    shards = halves.Shards(work / "shipped", sets.asked)
    for half in halves.HALVES:
        if not (shards.learned(half) / "manifest.json").exists():
            halves.python(["tools/make_shards.py", sets.folder / f"{half}-songs", "--out", shards.learned(half)])
    return shards


def trainings(config: Path, seed: int) -> list[halves.Job]:
    """A training on each three of the sets, and its tables."""
    name = f"configs/{config.name}"
    tables: dict[str, tuple[str, ...]] = {
        f"{name}, embedded by stages": ("--embedding", "stages"),
        name: ("--embedding", "backbone"),
        f"{name}, untrained, embedded by stages": ("--features", "untrained", "--embedding", "stages"),
    }
    return [halves.Job(name, "simsiam", half, seed, SETTINGS, tables) for half in halves.HALVES]


def minutes(job: halves.Job, folder: Path) -> float:
    """What a training took."""
    journal = folder / "runs" / f"{halves.slug(job.name)}-{job.trained_on}-{job.seed}" / "metrics.jsonl"
    records = map(json.loads, journal.read_text().splitlines())
    return max(60 * record.get("training_time_hours", 0.0) for record in records)


def page_lines(doc: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
    """The table, beside the recipe by stages. recipe: what `equal_time.py --part unheard` has written."""
    if doc["soundtracks"] != recipe["soundtracks"]:
        raise UserError("the two results are of other songs: measure both again")
    soundtracks, env = equal_time_scores.of_songs(doc, "soundtracks"), doc["environment"]
    base = recipe["scores"][STAGES]
    yield "| | seeds | 5-NN | | mAP@10 | |"
    yield "|---|---|---|---|---|---|"
    for row, own in {STAGES: base, **doc["scores"]}.items():
        cells = [str(len(by_seed(own, METRICS[0])))]
        for metric in METRICS:
            cells.append(f"{np.mean([each.mean() for each in by_seed(own, metric).values()]):.3f}")
            gap = None if own is base else difference(for_every_seed(own, base), base, metric)
            cells.append("" if gap is None else shown(gap, soundtracks))
        yield f"| {row} | {' | '.join(cells)} |"
    yield ""
    took = " and ".join(f"{doc['minutes'][half]:.0f}" for half in halves.HALVES)
    where = env["gpu"] or f"{env['cpu']}, {env['cores']} cores"
    yield f"Trainings of {took} minutes; {where}; {env['date']}, commit {env['commit']}."


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_places(parser)
    add = parser.add_argument
    add("--seeds", type=int, default=1, metavar="N", help="trainings on each three of the sets (default: 1)")
    args = parser.parse_args()
    if not args.json:
        raise UserError("--json FILE is needed: the scores of finished trainings are kept there")
    device = choose_device(args.device)
    config = halves.ROOT / "configs" / ("gpu.yaml" if device.type == "cuda" else "cpu.yaml")
    work = args.work.resolve()
    shards = prepare(work, (args.music or work / equal_time.UNHEARD / "music").resolve())
    doc = (
        json.loads(args.json.read_text()) if args.json.exists() else {"search": next(iter(run.SEARCHES)), "scores": {}}
    )
    for seed in range(args.seeds):
        for job in trainings(config, seed):
            if job.trained_on in doc["scores"].get(job.name, {}).get(str(seed), {}):
                continue
            halves.run_all([job], shards, shards.folder, config, device, side_by_side=1)
            equal_time.add_scores(doc, [job], shards.folder)
            doc.setdefault("minutes", {})[job.trained_on] = minutes(job, shards.folder)
            doc["environment"] = equal_time.machine.environment(device)
            equal_time.write(doc, args.json)
    print("\n".join(page_lines(doc, json.loads(newest("within-songs-unheard").read_text()))))


if __name__ == "__main__":
    main()
