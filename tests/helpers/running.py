"""Running the repository's commands as a user would, trainings above all, and reading what they left."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

from helpers import fork_server
from simsiam_dali.data.shards import ShardSet

ROOT = Path(__file__).resolve().parents[2]


def run_tool(name: str, *args: object) -> str:
    """Run a script of tools/ and return what it printed; it must succeed."""
    done = fork_server.run([sys.executable, str(ROOT / "tools" / name), *map(str, args)])
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


TINY = {
    "data.view_seconds": 1.5,
    "data.view_crops": "independent",
    "data.threads": 1,
    "data.stats_segments": 8,
    "encoder.epochs": 3,
    "encoder.batch_size": 4,
    "encoder.simsiam.backbone": "resnet18",
    "encoder.simsiam.backbone_width": 8,
    "encoder.simsiam.projection_dim": 32,
    "encoder.simsiam.predictor_hidden_dim": 8,
    "encoder.simsiam.n_mels": 16,
    "encoder.simsiam.augmentation.frequency_mask_param": 4,
    "encoder.simsiam.augmentation.time_mask_param": 10,
    "train.device": "cpu",
    "train.log_every": 1,
    "train.validate_every": 1,
    "train.closing_score": "false",  # tests/test_nearest_song.py has it
}


PATIENT = """
import sys, time
from simsiam_dali import train
from simsiam_dali.common.signals import Interrupt
from simsiam_dali.training.learner import Learner
step, note, came = Learner.step, Interrupt._note, []
def patient_step(self, *arguments):
    while not came:
        time.sleep(0.01)
    return step(self, *arguments)
def seen_note(self, *arguments):
    came.append(True)
    note(self, *arguments)
Learner.step, Interrupt._note = patient_step, seen_note
sys.exit(train.main())
"""
"""A training whose first step lasts until the signal has come."""


def command(folder: Path, shards: Path, *options: str, **over: object) -> list[str]:
    """`python -m simsiam_dali.train` with tiny settings, everything it writes below `folder`."""
    values = {
        **TINY,
        "data.shards": shards,
        "train.runs_dir": folder / "runs",
        "mlflow.tracking_uri": f"sqlite:///{folder}/mlflow.db",
        **{k.replace("__", "."): v for k, v in over.items()},
    }
    sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "simsiam_dali.train", *sets, *options]


def run(args: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run to the end, in `folder`."""
    return fork_server.run(args, folder, environment)


def start(args: list[str], folder: Path) -> fork_server.Process | subprocess.Popen[str]:
    """The same, left running; `began` is when."""
    began = time.time()
    process = fork_server.start(args, folder)
    process.began = began  # type: ignore
    return process


def run_ranks(number: int, args: list[str], folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run as many processes as torchrun would on this host, with its store and its variables; to their end."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(number)}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = [fork_server.start(args, folder, env | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(number)]
    said = [rank.communicate(timeout=600) for rank in ranks]
    return [subprocess.CompletedProcess(args, r.returncode or 0, *both) for r, both in zip(ranks, said, strict=True)]


def forked_stages(script: str) -> list[str]:
    """The words that run a script of benchmarks/ whose stages' processes do not import torch and DALI anew."""
    folder = ROOT / "benchmarks"
    code = f"""
import multiprocessing, runpy, sys
sys.path.insert(0, {str(folder)!r})
import measure
measure._CONTEXT = multiprocessing.get_context("fork")
sys.argv[0] = {script!r}
runpy.run_path({str(folder / script)!r}, run_name="__main__")
"""
    return [sys.executable, "-c", code]


def train(folder: Path, shards: Path, *options: str, **over: object) -> Path:
    """Train to the end without MLflow; the run's folder."""
    done = run(command(folder, shards, *options, mlflow__enabled="false", **over), folder)
    assert done.returncode == 0, done.stderr[-2000:]
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> training loss; a step written twice would show as a shorter dictionary than list."""
    pairs = [(r["step"], r["loss"]) for r in records(run_dir) if "loss" in r]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def epochs(run_dir: Path) -> list[dict]:
    """The epoch records without what depends on the clock."""
    timed = (
        "throughput/samples_per_s",
        "throughput/data_wait_share",
        "throughput/validation_seconds",
        "training_time_hours",
    )
    return [{k: v for k, v in r.items() if k not in timed} for r in records(run_dir) if "epoch" in r]


def wait_for_step(process: fork_server.Process | subprocess.Popen[str], run_parent: Path, step: int) -> None:
    """Until the journal holds the loss of `step`, written by this process and not by one before it."""
    deadline = time.monotonic() + 300
    while True:
        status = process.poll()  # before the journal is read: it may end in between
        for path in run_parent.glob("*/metrics.jsonl"):
            written = path.stat().st_mtime > process.began  # type: ignore
            if written and any(f'"step": {step}, "loss"' in line for line in path.read_text().splitlines()):
                return
        if status is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"never came to step {step} (status {status}): {process.communicate()}")
        time.sleep(0.01)


def refusal(args: list[str], folder: Path, **environment: str) -> str:
    """The one line that ended a command; it must be one, and no traceback."""
    done = run(args, folder, **environment)
    assert done.returncode == 1, done.stderr[-2000:] + done.stdout[-500:]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert "Traceback" not in done.stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], done.stderr
    assert not (folder / "runs").exists()
    return lines[-1]


def mark_damaged(shards: ShardSet, row: int) -> None:
    """Damage that `open_shards` does not see: size and time stay."""
    tar = shards.root / shards.segments["shard"][row]
    info, lines = tar.stat(), tar.with_suffix(".idx").read_text().splitlines()
    words = next(line for line in lines if f" {row:09d}.flac" in line).split()
    with tar.open("r+b") as file:
        file.seek(int(words[1]) + 200)
        file.write(b"no music" * 1000)
    os.utime(tar, ns=(info.st_atime_ns, info.st_mtime_ns))
