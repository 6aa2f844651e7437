"""Which change of the recipe learns more in the same time? python benchmarks/real_music/equal_time.py --json FILE

Each candidate is trained for as long as the recipe of configs/real_music_*.yaml is (its 80 epochs, or --epochs), not
for as many epochs: first the seconds of an epoch are measured, of all candidates in turn (waiting for data counts), and
a candidate that takes twice as long gets half the epochs. Five seeds, each from both halves; scores as in run.py. The
intervals of the differences are of a bootstrap over seeds and soundtracks, both drawn anew each time. A candidate is
given up as soon as its interval of mAP@10 lies below 0.

Candidates are compared on one set of soundtracks (`--part choose`, fetch.sh), and only the chosen ones are scored on
another (`--part report --rows ROW`, fetch.sh --report), and on a third and a fourth that were listed later (`--part
held-out`, `--part fourth`). `--part unheard` takes whole sets: encoders of three of them embed the songs of the one
that is left, whose soundtracks they have not heard; with `--part fifth` the same encoders embed a set that was listed
last. FILE holds the scores of every song after every training: the same command continues where it was stopped, on
another machine too.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import equal_time_scores
import halves
import numpy as np
import run
import torch
from candidates import CANDIDATES
from equal_time_scores import BASE, METRICS, PEER, Scores, page_lines

sys.path.append(str(Path(__file__).resolve().parents[1]))
import machine

from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.common.files import atomic_write
from simsiam_dali.config.load import load_config
from simsiam_dali.embedding.table import read_song_embeddings

TIMED_EPOCHS = 4
"""Epochs by which a candidate's speed is measured; the first, in which everything is built, does not count."""

NO_CHOICE = ("simple", "lightly")
"""Kinds with one output."""
UNHEARD = "unheard"
"""Two of the sets, each asked about by encoders of all other sets."""
FIFTH = "fifth"
"""A set that was listed last, asked about by the encoders of `UNHEARD`; both encoders of a seed are asked about it."""
PARTS = (*halves.SETS, UNHEARD, FIFTH)


def trainings(row: str, epochs: int, seed: int) -> list[halves.Job]:
    """A candidate's trainings by one seed, one from each half."""
    own = CANDIDATES[row]
    settings = {"encoder.epochs": epochs, "encoder.simsiam.embedding": "backbone", **own.settings}
    # Said again to `embed`, since a run that is gone on with may have been configured otherwise.
    embedding = own.embedding or str(settings["encoder.simsiam.embedding"])
    words = () if own.kind in NO_CHOICE else ("--embedding", embedding)
    tables: dict[str, tuple[str, ...]] = {row: (*words, "--features", "untrained") if own.untrained else words}
    name = own.trained_as or row
    return [halves.Job(name, own.kind, half, seed, settings, tables, own.segment_seconds) for half in halves.HALVES]


def merged(jobs: Iterable[halves.Job]) -> list[halves.Job]:
    """Jobs of one training as one, which makes all of their tables."""
    found: dict[tuple[str, str, int], halves.Job] = {}
    for job in jobs:
        key = (job.name, job.trained_on, job.seed)
        tables = {**found[key].tables, **job.tables} if key in found else job.tables
        found[key] = dataclasses.replace(job, tables=tables)
    return list(found.values())


@dataclass(frozen=True)
class Setup:
    """What trains."""

    shards: halves.Shards
    config: Path
    device: torch.device
    side_by_side: int

    def train(self, wanted: Sequence[halves.Job], folder: Path) -> None:
        """Train, and embed the other half, whatever is not in `folder` yet."""
        halves.run_all(wanted, self.shards, folder, self.config, self.device, self.side_by_side)

    def costs(self, rows: Sequence[str]) -> dict[str, float]:
        """Seconds of an epoch of each candidate over the recipe's, which is timed in the same sitting.

        Medians, from a short training on each half, as many side by side as later.
        """
        trained = {row: CANDIDATES[row].trained_as or row for row in rows if row != PEER}
        timed = {*trained.values()} - {BASE}
        with TemporaryDirectory(dir=self.shards.folder) as name:
            seconds = {row: self._epoch_seconds(row, Path(name)) for row in (BASE, *sorted(timed)) if timed}
        # The peer keeps no journal: it is given the recipe's steps.
        return {row: seconds[trained[row]] / seconds[BASE] if trained.get(row, BASE) in timed else 1.0 for row in rows}

    def _epoch_seconds(self, row: str, folder: Path) -> float:
        timed = trainings(row, TIMED_EPOCHS, 0)
        self.train(timed, folder)
        seconds: list[float] = []
        for job in timed:
            journal = folder / "runs" / f"{halves.slug(job.name)}-{job.trained_on}-0" / "metrics.jsonl"
            records = map(json.loads, journal.read_text().splitlines())
            hours = [record["training_time_hours"] for record in records if record.get("epoch")]
            seconds += [3600 * (after - before) for before, after in itertools.pairwise(hours)]
        return statistics.median(seconds)


def document(path: Path, base_epochs: int, search: str) -> dict[str, Any]:
    """What the file holds, or a new one. Raises UserError where its scores would not compare."""
    if not path.exists():
        return {"search": search, "base_epochs": base_epochs, "cost": {BASE: 1.0}, "scores": {}}
    doc: dict[str, Any] = json.loads(path.read_text())
    if doc["search"] != search:
        raise UserError(f"{path} is scored by {doc['search']!r}: choose another file, or --search")
    if doc["base_epochs"] != base_epochs:
        raise UserError(f"{path} is of {doc['base_epochs']} epochs of the recipe: choose another file")
    return doc


def missing(doc: Mapping[str, Any], row: str, seed: int) -> list[halves.Job]:
    """A candidate's trainings by one seed that the document has no scores of; none of one that is given up."""
    if row != BASE and equal_time_scores.is_given_up(doc, row):
        return []
    done = doc["scores"].get(row, {}).get(str(seed), {})
    return [job for job in trainings(row, doc["epochs"][row], seed) if job.trained_on not in done]


def add_scores(doc: dict[str, Any], done: Sequence[halves.Job], folder: Path) -> None:
    """Put the scores of trainings into the document."""
    made = [(job, row) for job in done for row in job.tables]
    for of, row in made:
        found = scored(of.table(folder, row), doc["search"])
        own = doc["scores"].setdefault(row, {}).setdefault(str(of.seed), {})
        own[of.trained_on] = {metric: found[metric].round(4).tolist() for metric in METRICS}
        doc.setdefault("untagged", {})[of.trained_on] = np.flatnonzero(found["soundtrack/untagged"]).tolist()
        doc.setdefault("soundtracks", {})[of.trained_on] = found["soundtrack/of"].tolist()


def write(doc: Mapping[str, Any], path: Path) -> None:
    """Write the document, whole or not at all."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(doc) + "\n")


def shards_of(part: str, work: Path) -> halves.Shards:
    """Where the shards of a part lie, in the folder of all parts."""
    of = {UNHEARD: halves.sets_of, FIFTH: halves.fifth_of}
    return of.get(part, halves.halves_of)(work / part)


def prepare(part: str, work: Path, music: Path, rows: Sequence[str]) -> halves.Shards:
    """Fetch and pack what is not there yet of a part, for these rows."""
    lengths = {halves.SEGMENT_SECONDS, *(CANDIDATES[row].segment_seconds for row in rows)}
    if part in (UNHEARD, FIFTH):
        sets = halves.prepare_sets(work / UNHEARD, music, lengths)
        return sets if part == UNHEARD else halves.prepare_fifth(work / part, sets, music, lengths)
    return halves.prepare(work / part, music, halves.SETS[part], lengths)


def baseline_table(name: str, half: str, shards: halves.Shards, seed: int = 0) -> Path:
    """The table of a baseline of the songs that `half` is asked about; an untrained encoder is of the seed's recipe."""
    folder = shards.folder / "equal-time"
    table = next(job.table(folder, name) for job in trainings(BASE, 1, seed) if job.trained_on == half)
    if not table.exists():
        run_dir = folder / "runs" / f"{halves.slug(BASE)}-{half}-{seed}"
        words = ["--checkpoint", run_dir, "--shards", shards.asked[half], *run.BASELINES[name], "--out", table]
        halves.python(["-m", "simsiam_dali.embed", *words])
    return table


def scored(table: Path, search: str) -> dict[str, np.ndarray]:
    """`run.of_each_song`, compared by this rule."""
    return run.of_each_song(table, vectors=run.SEARCHES[search](read_song_embeddings(table)))


def baselines(shards: halves.Shards, doc: Mapping[str, Any]) -> dict[str, dict[str, Scores]]:
    """Each baseline's scores, as the document has a row's. The untrained encoder is another one for each seed.

    Those that the document lacks need the recipe's run: a seed that was trained elsewhere is left out.
    """
    runs, seeds = shards.folder / "equal-time" / "runs", list(doc["scores"][BASE])
    found: dict[str, dict[str, Scores]] = {name: dict(doc.get("baselines", {}).get(name, {})) for name in run.BASELINES}
    for name, own in found.items():
        for seed in seeds if "untrained" in run.BASELINES[name] else seeds[:1]:
            if seed in own or not all((runs / f"{halves.slug(BASE)}-{half}-{seed}").exists() for half in halves.HALVES):
                continue
            tables = {half: baseline_table(name, half, shards, int(seed)) for half in halves.HALVES}
            each = {half: scored(table, doc["search"]) for half, table in tables.items()}
            own[seed] = {half: {m: scores[m].round(4).tolist() for m in METRICS} for half, scores in each.items()}
    return {name: own for name, own in found.items() if own}


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_common(parser)
    add = parser.add_argument
    add("--part", choices=PARTS, default="choose", help="soundtracks to compare on (default: choose)")
    add("--seeds", type=int, default=5, metavar="N", help="trainings of each candidate on each half (default: 5)")
    add("--epochs", type=int, metavar="N",
        help="epochs of the recipe; every row gets the same time (default: as configured)")  # fmt: skip
    add("--rows", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES), metavar="ROW",
        help=f"candidates, beside {BASE} (default: all): {', '.join(CANDIDATES)}")  # fmt: skip
    add("--search", choices=list(run.SEARCHES), default=next(iter(run.SEARCHES)), metavar="RULE",
        help=f"how songs are compared: {', '.join(run.SEARCHES)} (default: the first)")  # fmt: skip
    args = parser.parse_args()
    if not args.json:
        raise UserError("--json FILE is needed: the scores of finished trainings are kept there")
    device, config, side_by_side = run.common(args)
    work, rows = args.work.resolve(), list(dict.fromkeys([BASE, *args.rows]))
    doc = document(args.json, args.epochs or load_config(config).encoder.epochs, args.search)
    music = args.music or work / (UNHEARD if args.part == FIFTH else args.part) / "music"
    shards = prepare(args.part, work, music.resolve(), rows)
    setup, folder = Setup(shards, config, device, side_by_side), shards.folder / "equal-time"
    if untimed := [row for row in rows if row not in doc["cost"]]:
        doc["cost"] |= setup.costs(untimed)
        write(doc, args.json)
    doc["epochs"] = equal_time_scores.epochs_of(doc["cost"], doc["base_epochs"])

    for seed in range(args.seeds):
        # Of all rows at once, so that no core waits.
        wanted = merged(job for row in rows for job in missing(doc, row, seed))
        if wanted:
            setup.train(wanted, folder)
            add_scores(doc, wanted, folder)
            doc["environment"] = machine.environment(device)  # of the latest training
            write(doc, args.json)
    doc["baselines"] = baselines(shards, doc)
    write(doc, args.json)
    print("\n".join(page_lines(doc)))


if __name__ == "__main__":
    main()
