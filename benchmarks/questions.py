"""Answers to the plan's open questions (section 17) from runs: python benchmarks/questions.py DIR --json FILE

Trains the demo library's recipe (configs/demo.yaml) with one thing changed at a time, embeds all songs, and scores how
near songs of one artist are: mAP@10 over the cosine of standardised embeddings, for each song among all others, with
its 95% bootstrap interval over songs, and that of its difference from the recipe as it is. SimSiam sees no label, so
training songs count too. Shards, runs and tables stay in DIR; a run that is there is not trained again.

python benchmarks/questions.py --write   puts the table of the newest result into docs/questions.md
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch

from simsiam_dali import embeddings, probes, scores, splits
from simsiam_dali.errors import UserError, one_line_errors
from simsiam_dali.labels import artist_keys

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "questions"
PAGE = ROOT / "docs" / "questions.md"
BEGIN, END = "<!-- runs -->\n", "<!-- /runs -->"

AUGMENTATION = "encoder.simsiam.augmentation"
NONE = {
    f"{AUGMENTATION}.{name}_prob": 0
    for name in ("time_shift", "time_stretch", "pitch_shift", "noise", "gain", "reverb", "frequency_mask", "time_mask")
}
WEAK = {
    f"{AUGMENTATION}.time_stretch_range": "[0.9, 1.1]",
    f"{AUGMENTATION}.pitch_shift_range": "[-1, 1]",
    f"{AUGMENTATION}.noise_snr_range": "[21, 36]",
    f"{AUGMENTATION}.gain_range": "[-3, 3]",
    f"{AUGMENTATION}.reverb_drr_range": "[6, 18]",
    f"{AUGMENTATION}.frequency_mask_param": 6,
    f"{AUGMENTATION}.time_mask_param": 12,
}
STRONG = {
    f"{AUGMENTATION}.time_stretch_range": "[0.6, 1.4]",
    f"{AUGMENTATION}.pitch_shift_range": "[-4, 4]",
    f"{AUGMENTATION}.noise_snr_range": "[5, 20]",
    f"{AUGMENTATION}.gain_range": "[-12, 12]",
    f"{AUGMENTATION}.reverb_drr_range": "[-6, 6]",
    f"{AUGMENTATION}.frequency_mask_param": 26,
    f"{AUGMENTATION}.time_mask_param": 50,
}
BASE = "the recipe"
RUNS: dict[str, dict[str, Any]] = {
    BASE: {},
    "128 mel bins": {
        "encoder.simsiam.n_mels": 128,
        f"{AUGMENTATION}.frequency_mask_param": 26,
    },
    "no augmentation (two places)": NONE,
    "twice the strength": STRONG,
    "half the strength": WEAK,
    "views of 8 s": {"data.view_seconds": 8},
}
"""One change each: what a row of the table is called, and its settings."""
OTHER_TABLES = {
    "projection instead of backbone": ("--embedding", "projection"),
    "untrained encoder": ("--features", "untrained"),
    "MFCC": ("--features", "mfcc"),
    "log-mel": ("--features", "log-mel"),
}
"""Further tables of the recipe's run."""


def python(*words: object) -> None:
    """Run a command of the project; its output goes to this terminal."""
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT)


def artist_precision(table: Path) -> np.ndarray:
    """AP@10 of each song that shares its artist with another, in the table's order."""
    songs = embeddings.read_songs(table)
    names = [artist_keys(own) for own in songs.table["artists"]]
    number = {name: i for i, name in enumerate(dict.fromkeys(name for own in names for name in own))}
    group = splits.groups(songs.table, "song")
    near, _ = probes.neighbours(songs.vectors, group, 10)
    retrieval = probes.Retrieval([[number[name] for name in own] for own in names], group, 10)
    return retrieval.average_precision(near)


def tables(folder: Path, seeds: int, wanted: Collection[str]) -> Iterator[tuple[str, int, Path]]:
    """Train and embed what is not there yet: (row, seed, embedding table)."""
    music, shards = folder / "music", folder / "shards"
    if not (shards / "manifest.json").exists():
        python("tools/make_demo_music.py", music)
        python("tools/make_shards.py", music, "--out", shards, "--segment-seconds", 10, "--val-fraction", 0.3)
    for seed in range(seeds):
        for row, over in RUNS.items():
            if row not in {BASE, *wanted}:
                continue
            name = re.sub(r"\W+", "-", f"{row} {seed}")
            run = folder / "runs" / name
            table = folder / f"{name}.parquet"
            if not table.exists():
                values = {**over, "train.runs_dir": folder / "runs", "mlflow.enabled": "false"}
                sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
                new = ("--config", "configs/demo.yaml", "--shards", shards, "--run-name", name, "--seed", seed, *sets)
                begun = (run / "checkpoint.pt").exists()
                python("-m", "simsiam_dali.train", *(("--resume", run) if begun else new))
                python("-m", "simsiam_dali.embed", "--checkpoint", run, "--out", table)
            yield row, seed, table
            if row == BASE:
                for other, options in OTHER_TABLES.items():
                    out = folder / f"{name}-{options[1]}.parquet"
                    if not out.exists():
                        python("-m", "simsiam_dali.embed", "--checkpoint", run, "--out", out, *options)
                    yield other, seed, out


def measure(folder: Path, seeds: int, wanted: Collection[str]) -> dict[str, Any]:
    """What --json writes: by row, mAP@10 of each seed, and over all seeds' songs the intervals."""
    found: dict[str, list[np.ndarray]] = {}
    for row, _, table in tables(folder, seeds, wanted):
        found.setdefault(row, []).append(artist_precision(table))
    metric = scores.METRICS["map_at_10"]

    def scored(row: str) -> scores.Score:
        # The mean over the seeds of each song's AP: songs are what is drawn, and seeds are too few to draw.
        return scores.score(metric, (np.mean(found[row], axis=0),), 2000, seed=0)

    base = scored(BASE)
    rows = {}
    for row, values in found.items():
        own = scored(row)
        rows[row] = {
            "seeds": [float(v.mean()) for v in values],
            "map_at_10": own.value,
            "interval": [own.low, own.high],
            "difference": own.value - base.value,
            "difference_interval": list(scores.interval(own.resampled - base.resampled)),
        }
    return {"environment": machine.environment(torch.device("cpu")), "songs": len(found[BASE][0]), "rows": rows}


def table_lines(doc: dict[str, Any]) -> Iterator[str]:
    """The Markdown table of a result."""
    yield "| | mAP@10 for artist, each seed | mean [95%] | difference from the recipe [95%] |"
    yield "|---|---|---|---|"
    for name, row in doc["rows"].items():
        seeds = ", ".join(f"{v:.3f}" for v in row["seeds"])
        low, high = row["interval"]
        less, more = row["difference_interval"]
        difference = "" if name == BASE else f"{row['difference']:+.3f} [{less:+.3f}, {more:+.3f}]"
        yield f"| {name} | {seeds} | {row['map_at_10']:.3f} [{low:.3f}, {high:.3f}] | {difference} |"
    env = doc["environment"]
    yield ""
    yield f"{doc['songs']} songs; {env['cpu']}, {env['cores']} cores; {env['date']}, commit {env['commit']}."


def page_with_table() -> str:
    """docs/questions.md with the newest result's table between its markers."""
    head, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{PAGE} has no {BEGIN.strip()} and {END}")
    newest = max(RESULTS.glob("*.json"))
    lines = table_lines(json.loads(newest.read_text()))
    return head + begin + "".join(f"{line}\n" for line in lines) + end + tail


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="where music, shards and runs are kept")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="runs of each row (default: %(default)s)")
    parser.add_argument(
        "--rows", nargs="+", choices=RUNS, default=list(RUNS), metavar="ROW",
        help=f"which to run, beside {BASE} (default: all): {', '.join(name for name in RUNS if name != BASE)}",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--write", action="store_true", help="put the newest result's table into docs/questions.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 when that table is out of date")
    args = parser.parse_args()
    if args.folder:
        doc = measure(args.folder.resolve(), args.seeds, args.rows)
        print("\n".join(table_lines(doc)))
        if args.json:
            args.json.write_text(json.dumps(doc, indent=1) + "\n")
    if args.check and page_with_table() != PAGE.read_text():
        raise UserError("docs/questions.md is out of date: run python benchmarks/questions.py --write")
    if args.write:
        PAGE.write_text(page_with_table())


if __name__ == "__main__":
    main()
