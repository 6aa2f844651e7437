"""What matters? One thing changed at a time in SimSiam's recipe: python benchmarks/real_music/experiments.py

The music, the halves and the scores are those of run.py beside it; every row is trained on the same few steps, fewer
than run.py's, from one half by one seed and from the other by the next. The table goes into docs/experiments.md:

    python benchmarks/real_music/experiments.py --json benchmarks/results/real_music/experiments-DATE.json
    python benchmarks/real_music/experiments.py --write

Everything stays in --work; the same command continues where it was stopped.
"""

import argparse
import functools
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import equal_time_scores
import halves
import run

from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import AugmentationConfig

PAGE = halves.ROOT / "docs" / "experiments.md"
RESULTS = halves.ROOT / "benchmarks" / "results" / "real_music"
AUGMENTATION = "encoder.simsiam.augmentation"
BASE, PROJECTION, UNTRAINED = "the recipe", "embedding: projection", "untrained encoder"

PROBABILITIES = {
    "time shift": "time_shift_prob",
    "time stretch": "time_stretch_prob",
    "pitch shift": "pitch_shift_prob",
    "noise": "noise_prob",
    "gain": "gain_prob",
    "reverb": "reverb_prob",
    "frequency mask": "frequency_mask_prob",
    "time mask": "time_mask_prob",
}
SWITCHED_ON = ("noise", "reverb")
"""Augmentations that the recipe leaves out: their rows have them at the default probability."""


def switched(name: str) -> dict[str, Any]:
    """One augmentation turned to what the recipe does not have: off, or on."""
    field = PROBABILITIES[name]
    value = AugmentationConfig.model_fields[field].default if name in SWITCHED_ON else 0
    return {f"{AUGMENTATION}.{field}": value}


ROWS: dict[str, dict[str, Any]] = {
    BASE: {},
    "no augmentation": {f"{AUGMENTATION}.{key}": 0 for key in PROBABILITIES.values()},
    **{f"{'with' if name in SWITCHED_ON else 'no'} {name}": switched(name) for name in PROBABILITIES},
    "both views of one crop": {"data.view_crops": "same"},
    "views of 2.5 s": {"data.view_seconds": 2.5, f"{AUGMENTATION}.time_mask_param": 7},
    "views of 10 s": {"data.view_seconds": 10, f"{AUGMENTATION}.time_mask_param": 30},
    "projector of 3 layers": {"encoder.simsiam.projection_layers": 3},
    "weight decay 1e-4": {"encoder.simsiam.weight_decay": 1e-4},
    "half the learning rate": {"encoder.simsiam.learning_rate": 0.5},
    "twice the learning rate": {"encoder.simsiam.learning_rate": 2},
    "pooling: mean": {"encoder.simsiam.pooling": "mean"},
}
"""What a row of the table is called, and its settings."""
FACTORS = ("encoder.simsiam.learning_rate",)
"""Settings that a row gives as a factor of the recipe's."""


def plan(seeds: int, epochs: int, rows: Mapping[str, dict[str, Any]], base: Mapping[str, Any]) -> Iterator[halves.Job]:
    """The trainings behind the table. Each seed learns from one half, in turn: both halves count, at half the cost.

    base: the recipe's value of each of FACTORS.
    """
    for seed in range(seeds):
        for row, over in rows.items():
            own = {key: base[key] * value if key in FACTORS else value for key, value in over.items()}
            tables: dict[str, tuple[str, ...]] = {row: ()}
            if row == BASE:
                tables |= {PROJECTION: ("--embedding", "projection"), UNTRAINED: ("--features", "untrained")}
            half = halves.HALVES[seed % len(halves.HALVES)]
            yield halves.Job(row, "simsiam", half, seed, {"encoder.epochs": epochs, **own}, tables)


def table_lines(doc: Mapping[str, Any]) -> Iterator[str]:
    """The Markdown table: of soundtracks, with the difference from the recipe."""
    yield "| | 5-NN | difference | mAP@10 | difference | of each seed |"
    yield "|---|---|---|---|---|---|"
    for row, own in doc["rows"].items():
        cells = []
        for name in ("soundtrack/knn", "soundtrack/map"):
            gap = own[name]["against"].get(BASE)
            cells.append(f"{own[name]['value']:.3f}")
            cells.append(f"{gap['difference']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" if gap else "")
        base = doc["rows"][BASE]["soundtrack/map"]["seeds"]
        each = own["soundtrack/map"]["seeds"].items()
        cells.append("" if row == BASE else ", ".join(f"{value - base[seed]:+.3f}" for seed, value in each))
        yield f"| {row} | {' | '.join(cells)} |"
    yield ""
    yield f"{doc['epochs']} epochs; {run.environment_line(doc)}"


def run_lines(doc: Mapping[str, Any]) -> Iterator[str]:
    """What run.py prints, as Markdown."""
    yield from run.table_lines(doc)
    yield ""
    yield from (f"- {line}" for line in run.verdict_lines(doc))
    yield ""
    yield run.environment_line(doc)


TABLES = {
    "run": run_lines,
    "experiments": table_lines,
    "equal-time-report": equal_time_scores.page_lines,
    "equal-time-choose": equal_time_scores.page_lines,
    "equal-time-held-out": equal_time_scores.page_lines,
    "equal-time-fourth": equal_time_scores.page_lines,
    "held-out": equal_time_scores.page_lines,
}
"""What stands between two comments of the page, made from the newest result of that name."""


def page_with_tables() -> str:
    """docs/experiments.md with the newest results' tables between their markers."""
    page = PAGE.read_text()
    for name, lines in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, found, rest = page.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise UserError(f"{PAGE} has no {begin.strip()} and {end}")
        newest = max(RESULTS.glob(f"{name}-*.json"))
        page = head + begin + "".join(f"{line}\n" for line in lines(json.loads(newest.read_text()))) + end + tail
    return page


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_common(parser)
    add = parser.add_argument
    add("--seeds", type=int, default=2, metavar="N", help="trainings of each row, on the halves in turn (default: 2)")
    add("--epochs", type=int, default=20, metavar="N", help="of each training (default: %(default)s)")
    others = ", ".join(name for name in ROWS if name != BASE)
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
        help=f"which to train, beside {BASE} (default: all): {others}")  # fmt: skip
    add("--write", action="store_true", help="only put the newest results' tables into docs/experiments.md")
    add("--check", action="store_true", help="only see whether they are up to date there; exit with 1 if not")
    args = parser.parse_args()
    if args.check and page_with_tables() != PAGE.read_text():
        raise UserError("docs/experiments.md is out of date: run python benchmarks/real_music/experiments.py --write")
    if args.write:
        PAGE.write_text(page_with_tables())
    if args.check or args.write:
        return
    device, config, side_by_side = run.common(args)
    work = args.work.resolve()
    started = time.perf_counter()
    halves.prepare(work, (args.music or work / "music").resolve())
    base = {key: functools.reduce(getattr, key.split("."), load_config(config)) for key in FACTORS}
    jobs = list(plan(args.seeds, args.epochs, ROWS, base))
    folder = work / f"experiments-{args.epochs}"
    wanted = [job for job in jobs if job.name in {BASE, *args.rows}]
    trained = halves.run_all(wanted, work, folder, config, device, side_by_side)
    doc = run.document(run.by_row(jobs, folder), [BASE], device) | {"epochs": args.epochs}
    doc["took"] = {"trainings": trained, "of": len(wanted), "minutes": (time.perf_counter() - started) / 60}
    if args.json:
        args.json.write_text(json.dumps(doc, indent=1) + "\n")
    print("\n".join(table_lines(doc)))


if __name__ == "__main__":
    main()
