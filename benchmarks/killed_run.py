"""A run as a user makes it, killed in the middle and gone on with, then its embeddings: python benchmarks/killed_run.py

    train    `python -m simsiam_dali.train` with `data.threads: auto`, validation and checkpoints; SIGKILL after half of
             its steps
    resume   the same run by --resume, with --profile, to its end
    embed    `python -m simsiam_dali.embed` of its shards

It fails where the journal lacks a step or has one twice, where the run did not go on from its checkpoint, and where a
song has no embedding. Without --shards it composes and packs songs of its own. MLflow is not used.
"""

import argparse
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
from document import write

from simsiam_dali.common.distributed import choose_device
from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.common.shipped import config_file
from simsiam_dali.config.load import default_config_file, load_config
from simsiam_dali.data.shards import ShardSet, open_shards
from simsiam_dali.embedding.table import read_embeddings
from simsiam_dali.training import checkpoint
from simsiam_dali.training.profiling import WARM_UP

ROOT = Path(__file__).resolve().parent.parent
NAME = "killed"
KEPT = ("metrics.jsonl", "config.yaml", "profile.txt", "trace.json.gz", "curves.png")
"""Files of the run that are copied into --out; the checkpoint is not."""
STEPS_PROFILED = 20
LEAST_STEPS = 4
"""Of an epoch: a smaller batch is taken where the shards hold fewer."""


@dataclass
class Commands:
    """Runs the commands of the project one after another, each with a log and its time. seconds: by log's name."""

    out: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def start(self, name: str, words: list[object]) -> subprocess.Popen[bytes]:
        """Start one; its output goes to NAME.log."""
        print(f"{name}: {' '.join(map(str, words))}", flush=True)
        with (self.out / f"{name}.log").open("wb") as log:
            return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def run(self, name: str, words: list[object]) -> str:
        """Run one to its end and return its output. Raises UserError where it fails."""
        began = time.monotonic()
        process = self.start(name, words)
        try:
            status = process.wait()
        finally:
            process.kill()
        self.seconds[name] = time.monotonic() - began
        if status != 0:
            raise UserError(f"{name} ended with status {status}:\n{self.log(name)[-3000:]}")
        print(f"{name}: done in {self.seconds[name]:.0f} s", flush=True)
        return self.log(name)

    def log(self, name: str) -> str:
        """What it has written so far."""
        return (self.out / f"{name}.log").read_text(errors="replace")


def steps_of(journal: Path) -> list[int]:
    """The steps whose losses a journal holds, in its order."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [record["step"] for record in records if "loss" in record]


def train_until_killed(commands: Commands, words: list[object], run_dir: Path, step: int) -> int:
    """Train, and kill after `step` steps; the last step that the journal then holds."""
    began = time.monotonic()
    process = commands.start("train", words)
    try:
        while max(steps_of(run_dir / "metrics.jsonl"), default=0) < step:
            if process.poll() is not None:
                raise UserError(f"train ended early, status {process.returncode}:\n{commands.log('train')[-3000:]}")
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    commands.seconds["train"] = time.monotonic() - began
    return max(steps_of(run_dir / "metrics.jsonl"))


def own_shards(commands: Commands, folder: Path, songs: int, seconds: float) -> Path:
    """Shards of composed songs, two segments of `seconds` each; a fifth of the songs is for validation."""
    lengths = [2 * seconds, 2 * seconds + 1]
    commands.run("songs", ["tools/make_demo_music.py", folder / "music", "--songs", songs, "--seconds", *lengths])
    packing = ["--segment-seconds", seconds, "--min-seconds", min(2.0, seconds), "--val-fraction", 0.2]
    commands.run("pack", ["tools/make_shards.py", folder / "music", "--out", folder / "shards", *packing])
    return folder / "shards"


def checked(run_dir: Path, total: int, before: int, resumed: str) -> None:
    """Raises UserError where the run did not go on from the step of its checkpoint, or its journal is not whole."""
    if not re.search(rf"continuing after step {before}\b", resumed):
        raise UserError(f"the run did not continue after step {before}, that of its checkpoint")
    if (steps := steps_of(run_dir / "metrics.jsonl")) != list(range(1, total + 1)):
        raise UserError(f"the journal does not hold the steps 1 to {total}, each once: {steps}")


def measured(args: argparse.Namespace, commands: Commands, folder: Path) -> dict[str, Any]:
    """Train, kill, go on, embed; what came of it."""
    device = choose_device("auto")
    file = args.config or default_config_file(device.type)
    shards: ShardSet = open_shards(args.shards or own_shards(commands, folder, args.songs, args.segment_seconds))
    config = load_config(file, {}, {}, [*args.assignments, f"data.shards={shards.root}"])
    batch, count = config.encoder.batch_size, shards.count("train")
    while batch > 2 and LEAST_STEPS * batch > count:
        batch //= 2
    epoch = count // batch  # steps
    if not epoch:
        raise UserError(f"{count} training segments are too few")
    epochs = max(2, math.ceil(args.steps / epoch))
    total, run_dir = epochs * epoch, folder / NAME
    values = {
        "data.shards": shards.root,
        "data.threads": "auto",
        "encoder.batch_size": batch,
        "encoder.epochs": epochs,
        "train.log_every": max(1, total // 20),
        "train.checkpoint_every": max(1, total // 10),
        "train.runs_dir": folder,
        "mlflow.enabled": "false",
    }
    sets = [word for each in args.assignments for word in ("--set", each)]
    sets += [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    words = ["-m", "simsiam_dali.train", "--config", file, "--run-name", NAME, *sets]
    killed = train_until_killed(commands, words, run_dir, total // 2)
    before = checkpoint.load(run_dir / checkpoint.FILE_NAME)["step"]
    took = commands.seconds["train"]
    print(f"killed after {took:.0f} s, at step {killed} of {total}; the checkpoint is of step {before}", flush=True)
    if not before:
        raise UserError("killed before there was a checkpoint of a trained encoder")
    again = ["-m", "simsiam_dali.train", "--resume", run_dir, "--set", f"train.runs_dir={folder}"]
    profiled = max(1, min(STEPS_PROFILED, total - before - WARM_UP))
    checked(run_dir, total, before, commands.run("resume", [*again, "--profile", profiled]))
    for name in KEPT:  # here, so that they are there where the embedding is cut short
        if (run_dir / name).exists():
            shutil.copy(run_dir / name, args.out / name)
    table = folder / "embeddings.parquet"
    commands.run("embed", ["-m", "simsiam_dali.embed", "--checkpoint", run_dir, "--out", table])
    embedded = len(read_embeddings(table).vectors)
    if embedded != len(shards.songs):
        raise UserError(f"{embedded} of {len(shards.songs)} songs have an embedding")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {
        "segments": {split: shards.count(split) for split in ("train", "val")},
        "songs": len(shards.songs),
        "batch_size": batch,
        "steps": total,
        "steps_profiled": profiled,
        "killed_after": killed,
        "checkpoint_of": before,
        "seconds": commands.seconds,
        "epochs": [record for record in map(json.loads, lines) if "epoch" in record],
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="killed_run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shards", type=Path, metavar="DIR", help="shards to train on (default: composed songs)")
    add("--songs", type=int, default=64, metavar="N", help="songs to compose (default: %(default)s)")
    add("--segment-seconds", type=float, default=60.0, metavar="S", help="of theirs (default: %(default)s)")
    add("--config", type=config_file, metavar="FILE", help="of the training (default: configs/gpu.yaml or cpu.yaml)")
    add("--set", action="append", default=[], metavar="a.b=c", dest="assignments", help="any setting of it")
    add("--steps", type=int, default=80, metavar="N", help="steps to train at the least (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help="logs, the run's curves and trace, result.json")
    return parser


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that its commands end with it
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="killed-run-") as name:
        result = measured(args, Commands(args.out.resolve()), Path(name))
    write({"environment": machine.environment(choose_device("auto")), "run": result}, args.out / "result.json")
    for record in result["epochs"]:
        if (rate := record.get("throughput/samples_per_s")) is not None:
            print(f"epoch {record['epoch']}: {rate:.1f} samples/s, "
                  f"waiting for data {record['throughput/data_wait_share']:.1%}")  # fmt: skip
    print(f"{result['songs']} songs embedded; {', '.join(f'{n} {s:.0f} s' for n, s in result['seconds'].items())}")


if __name__ == "__main__":
    main()
