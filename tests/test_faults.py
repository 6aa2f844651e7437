"""What a training run survives, done to real runs: kills while it writes, a full disk, a damaged checkpoint."""

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import fork_server
from helpers.full_disk import fill, small_disk
from helpers.logged_runs import mlflow_server
from helpers.ports import free_port
from helpers.running import command, losses, run, start, train, wait_for_step
from mlflow import MlflowClient

from simsiam_dali.config.load import load_config
from simsiam_dali.data.shards import open_shards
from simsiam_dali.tracking import run as tracking
from simsiam_dali.tracking.client import SERVER_TIMEOUT
from simsiam_dali.training import checkpoint

SIMPLE: dict[str, Any] = {
    "encoder__encoder_type": "simple",
    "encoder__simple__base_channels": 4,
    "encoder__embedding_dim": 24,
    "encoder__epochs": 4,
    "mlflow__enabled": "false",
}
"""A run of seconds, with checkpoints of less than a megabyte."""


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Path:
    """Such a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("simple")
    done = run(command(folder, small_shards, "--run-name", "whole", **SIMPLE), folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs/whole"


def is_as_if_nothing_had_happened(run_dir: Path, untouched: Path) -> None:
    """The same losses, each written once, and the same files."""
    assert losses(run_dir) == losses(untouched)
    assert {p.name for p in run_dir.iterdir()} == {p.name for p in untouched.iterdir()}


def test_a_damaged_checkpoint_is_refused_and_the_offered_one_continues(
    simple: Path, tmp_path: Path, small_shards: Path
) -> None:
    """A flipped byte in the newest, half way; the command that the error offers ends as if nothing had happened."""
    args = command(tmp_path, small_shards, **SIMPLE, train__checkpoint_every=2)
    process = start(args, tmp_path)
    wait_for_step(process, tmp_path / "runs", len(losses(simple)) // 2)
    process.kill()
    process.communicate()
    (run_dir,) = (tmp_path / "runs").iterdir()
    path = run_dir / checkpoint.FILE_NAME
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    refused = run(command(tmp_path, small_shards, "--resume", **SIMPLE), tmp_path)
    assert refused.returncode == 1
    previous = run_dir / checkpoint.PREVIOUS_NAME
    error = refused.stderr.splitlines()[-1]
    assert error.startswith(f"error: checkpoint {path} is damaged")
    assert error.endswith(f"the checkpoint before it is intact: --resume {previous}")
    done = run(command(tmp_path, small_shards, "--resume", str(previous), **SIMPLE), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    is_as_if_nothing_had_happened(run_dir, simple)


def test_a_journal_cut_short_by_a_kill_continues(simple: Path, tmp_path: Path, small_shards: Path) -> None:
    """And one that a kill before the first checkpoint left is begun again."""
    run_dir = tmp_path / "runs/again"
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"step": 0, "epoch": 0}\n{"step": 1, "lo')
    (run_dir / "checkpoint.part").write_bytes(b"PK")
    args = command(tmp_path, small_shards, "--run-name", "again", **SIMPLE)
    process = start(args, tmp_path)
    wait_for_step(process, tmp_path / "runs", len(losses(simple)) // 2)
    process.kill()
    process.communicate()
    with (run_dir / "metrics.jsonl").open("a") as f:
        f.write('{"step": 10')
    done = run(command(tmp_path, small_shards, "--resume", **SIMPLE), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    is_as_if_nothing_had_happened(run_dir, simple)


SLOW_SAVE = """
import time
from pathlib import Path
from simsiam_dali import train
write = Path.write_bytes
def write_slowly(path, content):
    if not path.name.startswith(".checkpoint.pt."):
        return write(path, content)
    with path.open("wb", buffering=0) as file:
        file.write(content[:100])
        time.sleep(0.5)
        file.write(content[100:])
Path.write_bytes = write_slowly
train.main()
"""


@pytest.mark.faults
def test_killed_while_it_writes_a_checkpoint(tmp_path: Path, small_shards: Path) -> None:
    """SIGKILL in three saves in the middle of an epoch: each time the last good checkpoint loads and goes on."""
    (tmp_path / "whole").mkdir()
    whole = train(tmp_path / "whole", small_shards, encoder__epochs=2)
    over = {"encoder__epochs": 2, "mlflow__enabled": "false", "train__checkpoint_every": 1}
    args = command(tmp_path, small_shards, "--run-name", "killed", **over)
    run_dir = tmp_path / "runs/killed"
    for step in (2, 4, 7):  # of 6 an epoch
        process = start([args[0], "-c", SLOW_SAVE, *args[3:]], tmp_path)
        part = run_dir / f".{checkpoint.FILE_NAME}.{process.pid}.part"
        wait_for_step(process, tmp_path / "runs", step)
        while process.poll() is None and not (part.exists() and part.stat().st_size > 0):
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert part.exists()
        assert step - 1 <= checkpoint.load(run_dir / checkpoint.FILE_NAME)["step"] < len(losses(whole))
        args = command(tmp_path, small_shards, "--resume", **over)
    done = run(args, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    is_as_if_nothing_had_happened(run_dir, whole)


STOPPING = """
import os, signal, sys
from simsiam_dali import train
from simsiam_dali.training.run import Run
save = Run.save
def save_and_stop(self):
    save(self)
    print("saved", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
Run.save = save_and_stop
sys.exit(train.main())
"""


def stops(process: fork_server.Process | subprocess.Popen[str]) -> Iterator[None]:
    """Each time that it has stopped itself, after a save; it is continued afterwards."""
    try:
        while process.poll() is None:
            if stands_still(process.pid):
                yield
                process.send_signal(signal.SIGCONT)
            time.sleep(0.01)
    finally:
        process.kill()  # where the test has failed meanwhile


def stands_still(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "T"
    except FileNotFoundError:  # it has ended
        return False


def test_a_full_disk_does_not_end_a_run(simple: Path, tmp_path: Path, small_shards: Path) -> None:
    """It warns and goes on; where the last checkpoint cannot be written it ends with the error, and can be resumed."""
    total = len(losses(simple))
    with small_disk(tmp_path / "runs", "20m") as disk:
        args = command(tmp_path, small_shards, "--run-name", "full", **SIMPLE)
        process = start([args[0], "-c", STOPPING, *args[3:]], tmp_path)
        filler = None
        for _ in stops(process):
            filler = filler or fill(disk)
        assert filler is not None, process.communicate()
        out, err = process.communicate()
        assert process.returncode == 1, err[-2000:]
        path = disk / "full" / checkpoint.FILE_NAME
        said = f"cannot write the checkpoint {path} (No space left on device); the checkpoint before it is kept"
        journal = f"cannot write {disk / 'full/metrics.jsonl'} (No space left on device)"
        warnings = [line for line in out.splitlines() if line.startswith("warning: step ")]
        assert len(warnings) == SIMPLE["encoder__epochs"]
        assert all(said in w or journal in w for w in warnings), warnings
        assert warnings[-1].startswith(f"warning: step {total}: ")
        assert "Traceback" not in err
        assert err.splitlines()[-1] in (f"error: {said}", f"error: {journal}")
        assert checkpoint.load(path)["step"] == 0

        filler.unlink()
        args = command(tmp_path, small_shards, "--resume", "full", **SIMPLE)
        process = start([args[0], "-c", STOPPING, *args[3:]], tmp_path)
        for number, _ in enumerate(stops(process)):
            if number == 0:
                filler = fill(disk)
            elif number == 1:
                filler.unlink()
        out, err = process.communicate()
        assert process.returncode == 0, err[-2000:]
        assert ["warning: step" in part for part in out.split("saved\n")[:2]] == [False, True]
        is_as_if_nothing_had_happened(disk / "full", simple)


def wait_for_epoch(process: fork_server.Process | subprocess.Popen[str], run_dir: Path, epoch: int) -> None:
    """Until the journal holds the epoch's record."""
    deadline = time.monotonic() + 300
    path = run_dir / "metrics.jsonl"
    while not (path.exists() and f'"epoch": {epoch},' in path.read_text()):
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_all_there(uri: str, run_dir: Path) -> None:
    """Each number of the journal's epochs once, under its step; the files; and that the run has finished."""
    client = MlflowClient(uri)
    run_id = checkpoint.load(run_dir / checkpoint.FILE_NAME)["mlflow_run"]
    assert run_id is not None
    found = client.get_run(run_id)
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    epochs = [record for record in lines if "epoch" in record]
    assert len(epochs) == SIMPLE["encoder__epochs"] + 1
    expected: dict[str, dict[int, float]] = {}
    for record in epochs:
        for name, value in tracking.loggable(record).items():
            expected.setdefault(name, {})[record["step"]] = value
    assert expected["encoder/train_loss"]
    assert found.data.metrics.keys() == expected.keys()
    for name, values in expected.items():
        logged = [(m.step, m.value) for m in client.get_metric_history(run_id, name)]
        assert len(logged) == len(values), name
        assert dict(logged) == pytest.approx(values), name
    assert found.info.status == "FINISHED"
    files = {f.path for f in client.list_artifacts(run_id)}
    assert files == {"config.yaml", "checkpoint.pt", "curves.png"}


@pytest.mark.faults
def test_the_mlflow_server_is_gone_for_a_while(tmp_path: Path, small_shards: Path) -> None:
    """Killed after the first epoch, back before the last: every metric arrives, under its step, once."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    over = SIMPLE | {"mlflow__enabled": "true", "mlflow__tracking_uri": uri}
    run_dir = tmp_path / "runs/tracked"
    with mlflow_server(tmp_path, port):
        process = start(command(tmp_path, small_shards, "--run-name", "tracked", **over), tmp_path)
        wait_for_epoch(process, run_dir, 1)
        process.send_signal(signal.SIGSTOP)  # the server's start takes longer than these epochs
    process.send_signal(signal.SIGCONT)
    wait_for_epoch(process, run_dir, 3)
    process.send_signal(signal.SIGSTOP)
    with mlflow_server(tmp_path, port):
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-2000:]
        assert out.count(f"warning: MLflow at {uri} is unreachable") == 1
        assert out.count("is reachable again and complete") == 1
        assert "--resume" not in out
        is_all_there(uri, run_dir)


@pytest.mark.faults
def test_the_mlflow_server_does_not_come_back(tmp_path: Path, small_shards: Path) -> None:
    """The run ends well and says how to send the rest; that sends it, from the journal, and only once."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    over = SIMPLE | {"mlflow__enabled": "true", "mlflow__tracking_uri": uri}
    run_dir = tmp_path / "runs/tracked"
    with mlflow_server(tmp_path, port):
        process = start(command(tmp_path, small_shards, "--run-name", "tracked", **over), tmp_path)
        wait_for_epoch(process, run_dir, 1)
        process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    assert "Traceback" not in err
    last = out.splitlines()[-1]
    assert last == f"MLflow lacks a part of this run: when it answers again, send it with --resume {run_dir}"
    assert time.monotonic() - began < 120  # MLflow's own retries would take minutes for each epoch
    with mlflow_server(tmp_path, port):
        assert MlflowClient(uri).get_run(checkpoint.load(run_dir / checkpoint.FILE_NAME)["mlflow_run"])
        for _ in range(2):  # the second has nothing left to send
            done = run(command(tmp_path, small_shards, "--resume", str(run_dir), **over), tmp_path)
            assert done.returncode == 0, done.stderr[-2000:]
            is_all_there(uri, run_dir)


@pytest.mark.faults
def test_a_server_that_accepts_and_never_answers_costs_seconds(tmp_path: Path, small_shards: Path) -> None:
    """What is slower than a refused connection: the wait after an epoch has an end."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    config = load_config(assignments=["encoder.encoder_type=simple", f"mlflow.tracking_uri={uri}"])
    with mlflow_server(tmp_path, port):
        tracker = tracking.Tracker(config, open_shards(small_shards), "held", None, True)
        tracker.log_epoch({"step": 1, "epoch": 1, "encoder/train_loss": 1.0})
    with socket.create_server(("127.0.0.1", port)):
        began = time.monotonic()
        tracker.log_epoch({"step": 2, "epoch": 2, "encoder/train_loss": 0.5})
        tracker.end("FINISHED")
        assert not tracker.complete
        assert time.monotonic() - began < 2 * SERVER_TIMEOUT + 5
    with mlflow_server(tmp_path, port):
        tracker.end("FINISHED")
        assert tracker.complete
        history = MlflowClient(uri).get_metric_history(tracker.run_id, "encoder/train_loss")
        assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5)]
