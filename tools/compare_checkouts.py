"""Do two checkouts compute the same? python tools/compare_checkouts.py BEFORE AFTER [--folder DIR]

Runs the commands of each checkout in processes of its own, on a small demo library that both share, and compares the
files they write: every byte of the packed shards but their modification times; the losses, the epochs' scores and the
final checkpoint of 20 seeded steps of each encoder type, uninterrupted, and killed and resumed from the checkpoint of
step 11, also from the other checkout's; the table of embeddings and its baselines; `evaluate`'s figures.
Floating-point numbers are compared bit by bit. Prints a line for each difference; exits with status 1 if there is any.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

ENCODERS = ("simsiam", "simple")
STEPS, CHECKPOINT_STEP = 20, 11
PACKING = ("--segment-seconds", 3, "--min-seconds", 2, "--val-fraction", 0.25, "--segments-per-shard", 16)
SETTINGS = {
    "data.shards": "shards",
    "data.view_seconds": 1.5,
    "data.view_crops": "independent",
    "data.threads": 1,
    "data.stats_segments": 8,
    "encoder.epochs": 2,
    "encoder.batch_size": 6,
    "encoder.embedding_dim": 24,
    "encoder.simple.base_channels": 4,
    "encoder.simsiam.backbone": "resnet18",
    "encoder.simsiam.backbone_width": 16,
    "encoder.simsiam.projection_dim": 32,
    "encoder.simsiam.predictor_hidden_dim": 8,
    "encoder.simsiam.n_mels": 16,
    "encoder.simsiam.augmentation.frequency_mask_param": 4,
    "encoder.simsiam.augmentation.time_mask_param": 10,
    "train.device": "cpu",
    "train.seed": 3,
    "train.log_every": 1,
    "train.checkpoint_every": CHECKPOINT_STEP,
    "train.validate_every": 1,
    "train.closing_score": "false",
    "mlflow.enabled": "false",
}
BY_THE_CLOCK = ("throughput/", "training_time_hours")
ABOUT_THE_CALL = ("date", "command", "embeddings", "floor", "baseline", "MLflow", "checkpoint_sha256")
IN_WORDS = ("verdict", "statements")  # of figures that are compared themselves
NO_DATES = "mtime_ns"


@dataclass(frozen=True)
class Checkout:
    """A checkout, and the folder in which its commands run."""

    root: Path
    folder: Path

    def popen(self, *words: object) -> "subprocess.Popen[str]":
        """Start `python WORDS` with this checkout's package and with the settings of bit-exact runs."""
        env = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=self.folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: object) -> None:
        """The same, to its end. Raises SystemExit with what it printed when it fails."""
        process = self.popen(*words)
        printed = process.communicate()[0]
        if process.returncode:
            sys.exit(f"{self.root}: python {' '.join(map(str, words))} failed:\n{printed[-3000:]}")


def train(name: str, encoder: str) -> list[object]:
    """The words of a training that makes `runs/<name>`."""
    sets = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    return ["-m", "simsiam_dali.train", *sets, "--encoder-type", encoder, "--run-name", name]


def logged_steps(run: Path) -> int:
    """How many losses the journal of a run holds."""
    path = run / "metrics.jsonl"
    return len(losses(run)) if path.exists() else 0


def kill_after_checkpoint(checkout: Checkout, encoder: str) -> None:
    """Leave `runs/<encoder>-killed` as a SIGKILL leaves it between the checkpoint of step 11 and the next one."""
    run = checkout.folder / "runs" / f"{encoder}-killed"
    for _ in range(5):  # on a busy machine the run may be past the next checkpoint before we look
        process = checkout.popen(*train(run.name, encoder))
        while process.poll() is None and logged_steps(run) <= CHECKPOINT_STEP:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=False)["step"] == CHECKPOINT_STEP:
            return
        shutil.rmtree(run)
    sys.exit(f"{checkout.root}: cannot kill a {encoder} run between step {CHECKPOINT_STEP} and the next checkpoint")


def use(checkout: Checkout, music: Path) -> None:
    """Run every command of the checkout that is compared."""
    checkout.folder.mkdir(parents=True)
    checkout.run(checkout.root / "tools/make_shards.py", music, "--out", "shards", "--workers", 1, *PACKING)
    for encoder in ENCODERS:
        checkout.run(*train(encoder, encoder))
        kill_after_checkpoint(checkout, encoder)
        shutil.copytree(checkout.folder / f"runs/{encoder}-killed", checkout.folder / f"runs/{encoder}-resumed")
        resume(checkout, f"{encoder}-resumed")
        table = f"tables/{encoder}/embeddings.parquet"
        # An older checkout calls its baselines floors.
        name = "baselines" if '"--baselines"' in (checkout.root / "simsiam_dali/embed.py").read_text() else "floors"
        baselines = checkout.folder / f"tables/{encoder}" / name
        embed = ("-m", "simsiam_dali.embed", "--checkpoint", f"runs/{encoder}", "--out", table)
        checkout.run(*embed, f"--{name}", baselines)
        options = ("--resamples", 20, "--no-maps", "--no-mlflow")
        checkout.run("-m", "simsiam_dali.evaluate", "--embeddings", table, "--out", f"evaluation/{encoder}", *options)
        baselines.rename(baselines.with_name("baselines"))


def resume(checkout: Checkout, name: str) -> None:
    """Continue `runs/<name>` to its end."""
    checkout.run("-m", "simsiam_dali.train", "--resume", f"runs/{name}")


def records(run: Path) -> list[dict[str, Any]]:
    """The journal's whole lines, without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    parsed = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in record.items() if not k.startswith(BY_THE_CLOCK)} for record in parsed]


def losses(run: Path) -> dict[int, float]:
    """Loss of each step; Python's JSON reads back every bit of a double."""
    return {record["step"]: record["loss"] for record in records(run) if "loss" in record}


def checkpoint(run: Path) -> Any:
    """What a run's checkpoint holds, as JSON without the time it took; a tensor is its type, shape and checksum."""
    return without(plain(torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=False)), "seconds")


def plain(value: Any) -> Any:
    """A value of a checkpoint as JSON."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        value = value.contiguous().numpy()
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {plain(value.tobytes())}"
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value


def without(value: Any, *keys: str) -> Any:
    """A JSON value without these keys, at any depth."""
    if isinstance(value, dict):
        return {k: without(v, *keys) for k, v in value.items() if k not in keys}
    return [without(v, *keys) for v in value] if isinstance(value, list) else value


def differences_of(a: Any, b: Any, where: str) -> Iterator[str]:
    """A line for each leaf of two JSON values that differs (NaN equals NaN)."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a | b:
            yield from differences_of(a.get(key, "missing"), b.get(key, "missing"), f"{where}, {key}")
    elif isinstance(a, list) and isinstance(b, list):
        for i, (x, y) in enumerate(zip_longest(a, b, fillvalue="missing")):
            yield from differences_of(x, y, f"{where}, {i}")
    elif repr(a) != repr(b):
        yield f"{where}: {a} before, {b} after"


def files_below(folder: Path) -> set[str]:
    """Relative names of all files."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def shard_differences(before: Path, after: Path) -> Iterator[str]:
    """A line for each file of two shard sets that differs."""
    names = files_below(before) | files_below(after)
    for name in sorted(names):
        a, b = before / name, after / name
        if not (a.exists() and b.exists()):
            yield f"shards, {name}: only {'before' if a.exists() else 'after'}"
        elif name == "manifest.json":
            old, new = (without(json.loads(path.read_bytes()), NO_DATES) for path in (a, b))
            yield from differences_of(old, new, f"shards, {name}")
        elif a.read_bytes() != b.read_bytes():
            yield f"shards, {name}: {a.stat().st_size} bytes before, {b.stat().st_size} bytes after, not the same"


def table_differences(before: Path, after: Path, where: str) -> Iterator[str]:
    """A line for each column of two tables that differs."""
    a, b = (pq.read_table(path) for path in (before, after))
    if a.column_names != b.column_names:
        yield f"{where}: columns {a.column_names} before, {b.column_names} after"
    for name in set(a.column_names) & set(b.column_names):
        # as text: NaN equals NaN, and Python prints every bit of a double (a float32 is one exactly)
        if a[name].type != b[name].type or repr(a[name].to_pylist()) != repr(b[name].to_pylist()):
            yield f"{where}: column {name} differs"


def compare(before: Path, after: Path) -> Iterator[str]:
    """A line for each difference between the two folders that `use` has filled; prints what it compares."""
    yield from shard_differences(before / "shards", after / "shards")
    print(f"compared the {len(files_below(before / 'shards'))} files of the shards", flush=True)
    for encoder in ENCODERS:
        expected = losses(before / "runs" / encoder)
        if len(expected) != STEPS:
            yield f"{encoder}: {len(expected)} steps before, not {STEPS}"
        resumed = f"{encoder}-resumed"
        for a, b in (
            (before / "runs" / encoder, after / "runs" / encoder),
            (before / "runs" / resumed, after / "runs" / resumed),
            (before / "runs" / resumed, after / "runs" / f"{encoder}-from-before"),
        ):
            yield from differences_of(records(a), records(b), f"{b.name}, record")
            yield from differences_of(checkpoint(a), checkpoint(b), f"{b.name}, checkpoint")
            yield from differences_of(expected, losses(b), f"{b.name} (against {encoder} before), loss of step")
        print(f"compared the {STEPS} losses of {encoder} in 5 runs: {expected[1]!r} ... {expected[STEPS]!r}")
        tables = [str(p.relative_to(before)) for p in sorted((before / "tables" / encoder).rglob("*.parquet"))]
        for name in tables:
            if (after / name).exists():
                yield from table_differences(before / name, after / name, name)
            else:
                yield f"{name}: only before"
        print(f"compared the tables {', '.join(tables)}")
        texts = [(folder / "evaluation" / encoder / "metrics.json").read_text() for folder in (before, after)]
        a, b = (json.loads(text.replace('"floors": {', '"baselines": {')) for text in texts)
        a, b = (without(metrics, *ABOUT_THE_CALL, *IN_WORDS) for metrics in (a, b))
        yield from differences_of(a, b, f"{encoder}'s metrics.json")
        print(f"compared evaluation/{encoder}/metrics.json")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="a checkout")
    parser.add_argument("after", type=Path, metavar="AFTER", help="another")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="keep what the commands write here (default: nowhere)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compare-checkouts-") as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        before, after = (
            Checkout(args.before.resolve(), folder / "before"),
            Checkout(args.after.resolve(), folder / "after"),
        )
        music = folder / "music"
        folder.mkdir(parents=True, exist_ok=True)
        # One music folder: its files' dates are part of the shards.
        Checkout(after.root, folder).run(
            after.root / "tools/make_demo_music.py", music, "--songs", 36, "--seconds", 6, 8, "--workers", 2
        )
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(use, (before, after), (music, music)))
        for encoder in ENCODERS:
            name = f"{encoder}-from-before"
            shutil.copytree(before.folder / f"runs/{encoder}-killed", after.folder / "runs" / name)
            resume(after, name)
        found = list(compare(before.folder, after.folder))
    for line in found:
        print(line)
    print(f"{len(found)} differences" if found else "no difference")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
