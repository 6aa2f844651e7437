"""What does a training as it is shipped learn? python benchmarks/real_music/shipped.py --json FILE

Packing and training as in the README, without further settings: songs are packed by `tools/make_shards.py`, and the
encoder is trained by configs/cpu.yaml, on a GPU by configs/gpu.yaml, for as long as that takes. It learns from three
sets of soundtracks and embeds test set 1, whose soundtracks it has not heard: the songs and the scores of
`equal_time.py --part unheard`, whose result in the repository stands beside them.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import equal_time
import halves
import numpy as np
import run
from equal_time_scores import METRICS, STAGES, UNTRAINED_STAGES, newest, shown

from simsiam_dali.common.distributed import choose_device
from simsiam_dali.common.errors import UserError, one_line_errors

ASKED = halves.HALVES[0]
"""The part of `halves.sets_of` that is asked about test set 1."""
SETTINGS: dict[str, object] = {"mlflow.enabled": False, "train.closing_score": False}
"""Over the config: neither changes what is learned."""


def prepare(work: Path, music: Path) -> halves.Shards:
    """Fetch all sets, and pack what is not there yet: what is learned from, as a user would."""
    sets = halves.prepare_sets(work / equal_time.UNHEARD, music)
    shards = halves.Shards(work / "shipped", sets.asked)
    if not (shards.learned(ASKED) / "manifest.json").exists():
        halves.python(["tools/make_shards.py", sets.folder / f"{ASKED}-songs", "--out", shards.learned(ASKED)])
    return shards


def training(config: Path) -> halves.Job:
    """The training, and its tables."""
    name = f"configs/{config.name}"
    tables: dict[str, tuple[str, ...]] = {
        f"{name}, embedded by stages": ("--embedding", "stages"),
        name: ("--embedding", "backbone"),
        f"{name}, untrained, embedded by stages": ("--features", "untrained", "--embedding", "stages"),
    }
    return halves.Job(name, "simsiam", ASKED, 0, SETTINGS, tables)


def minutes(job: halves.Job, folder: Path) -> float:
    """What the training took."""
    journal = folder / "runs" / f"{halves.slug(job.name)}-{job.trained_on}-{job.seed}" / "metrics.jsonl"
    records = map(json.loads, journal.read_text().splitlines())
    return max(60 * record.get("training_time_hours", 0.0) for record in records)


def page_lines(doc: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
    """The table. recipe: the document of `equal_time.py --part unheard`."""
    soundtracks, env = np.array(doc["soundtracks"]), doc["environment"]
    if doc["soundtracks"] != recipe["soundtracks"][ASKED]:
        raise UserError("the two results are of other songs: measure both again")
    beside = {STAGES: recipe["scores"][STAGES], UNTRAINED_STAGES: recipe["baselines"][UNTRAINED_STAGES]}
    rows: dict[str, dict[str, np.ndarray]] = {}
    for row, seeds in beside.items():
        rows[row] = {metric: np.array([own[ASKED][metric] for own in seeds.values()]) for metric in METRICS}
    for row, scores in doc["scores"].items():
        rows[row] = {metric: np.array([scores[metric]]) for metric in METRICS}
    yield "| | seeds | 5-NN | | mAP@10 | |"
    yield "|---|---|---|---|---|---|"
    for row, own in rows.items():
        cells = [str(len(own[METRICS[0]]))]
        for metric in METRICS:
            gap = own[metric] - rows[STAGES][metric]  # a row of one seed is compared with each of the recipe's
            cells += [f"{own[metric].mean():.3f}", "" if row == STAGES else shown(gap, soundtracks)]
        yield f"| {row} | {' | '.join(cells)} |"
    yield ""
    trained, _, untrained = doc["scores"]
    gaps = [shown(rows[trained][metric] - rows[untrained][metric], soundtracks) for metric in METRICS]
    yield f"- {trained}, minus the same untrained: 5-NN {gaps[0]}, mAP@10 {gaps[1]}"
    yield ""
    where = env["gpu"] or f"{env['cpu']}, {env['cores']} cores"
    songs = f"{len(soundtracks)} songs of {len(set(doc['soundtracks']))} soundtracks"
    yield f"{songs}; a training of {doc['minutes']:.0f} minutes; {where}; {env['date']}, commit {env['commit']}."


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_places(parser)
    args = parser.parse_args()
    device = choose_device(args.device)
    config = halves.ROOT / "configs" / ("gpu.yaml" if device.type == "cuda" else "cpu.yaml")
    work = args.work.resolve()
    shards = prepare(work, (args.music or work / equal_time.UNHEARD / "music").resolve())
    job, folder = training(config), shards.folder
    halves.run_all([job], shards, folder, config, device, side_by_side=1)
    found = {row: run.of_each_song(job.table(folder, row)) for row in job.tables}
    doc = {
        "scores": {row: {m: own[m].round(4).tolist() for m in METRICS} for row, own in found.items()},
        "soundtracks": next(iter(found.values()))["soundtrack/of"].tolist(),
        "minutes": minutes(job, folder),
        "environment": equal_time.machine.environment(device),
    }
    if args.json:
        equal_time.write(doc, args.json)
    print("\n".join(page_lines(doc, json.loads(newest("within-songs-unheard").read_text()))))


if __name__ == "__main__":
    main()
