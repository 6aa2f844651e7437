"""What a training run survives, done to real runs: kills while it writes, a full disk, a damaged checkpoint."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from full_disk import fill, small_disk
from test_train import command, losses, run, start, train, wait_for_step

from simsiam_dali import checkpoint

SIMPLE = {
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


def test_a_damaged_checkpoint_is_refused_and_the_offered_one_goes_on(simple, tmp_path, small_shards):
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
    assert error.endswith(f"the one before it is whole: --resume {previous}")
    done = run(command(tmp_path, small_shards, "--resume", str(previous), **SIMPLE), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    is_as_if_nothing_had_happened(run_dir, simple)


def test_a_journal_cut_short_by_a_kill_goes_on(simple, tmp_path, small_shards):
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


@pytest.mark.faults
def test_killed_while_it_writes_a_checkpoint(tmp_path, small_shards):
    """SIGKILL in three saves in the middle of an epoch: each time the last good checkpoint loads and goes on."""
    (tmp_path / "whole").mkdir()
    whole = train(tmp_path / "whole", small_shards, encoder__epochs=2)
    over = {"encoder__epochs": 2, "mlflow__enabled": "false", "train__checkpoint_every": 1}
    args = command(tmp_path, small_shards, "--run-name", "killed", **over)
    run_dir = tmp_path / "runs/killed"
    part = run_dir / "checkpoint.part"
    for step in (2, 4, 7):  # of 6 an epoch
        for _ in range(5):  # until it is caught in the act
            process = start(args, tmp_path)
            wait_for_step(process, tmp_path / "runs", step)
            while process.poll() is None and not (part.exists() and part.stat().st_size > 0):
                time.sleep(0.001)
            process.kill()
            process.communicate()
            args = command(tmp_path, small_shards, "--resume", **over)
            if part.exists():
                break
        assert part.exists()
        assert step - 1 <= checkpoint.load(run_dir / checkpoint.FILE_NAME)["step"] < len(losses(whole))
    done = run(args, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    is_as_if_nothing_had_happened(run_dir, whole)


def test_a_full_disk_does_not_end_a_run(simple, tmp_path, small_shards):
    """It warns and goes on; where the last checkpoint cannot be written it ends with the error, and can be resumed."""
    total = len(losses(simple))
    with small_disk(tmp_path / "runs", "20m") as disk:
        process = start(command(tmp_path, small_shards, "--run-name", "full", **SIMPLE), tmp_path)
        wait_for_step(process, disk, 2)
        filler = fill(disk)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 1, err[-2000:]
        path = disk / "full" / checkpoint.FILE_NAME
        said = f"cannot write the checkpoint {path} ([Errno 28] No space left on device); the one before is kept"
        journal = f"cannot write {disk / 'full/metrics.jsonl'} (No space left on device)"
        warnings = [line for line in out.splitlines() if line.startswith("warning: step ")]
        assert 1 <= len(warnings) <= 4  # one for each epoch's end since
        assert all(said in w or journal in w for w in warnings), warnings
        assert warnings[-1].startswith(f"warning: step {total}: ")
        assert "Traceback" not in err
        assert err.splitlines()[-1] in (f"error: {said}", f"error: {journal}")
        kept = checkpoint.load(path)["step"]
        assert kept < total

        filler.unlink()
        args = command(tmp_path, small_shards, "--resume", "full", **SIMPLE)
        with (tmp_path / "out").open("w") as out_file:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(args, cwd=tmp_path, env=env, stdout=out_file, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and checkpoint.load(path)["step"] == kept:
            time.sleep(0.01)
        filler = fill(disk)
        while process.poll() is None and "warning: step" not in (tmp_path / "out").read_text():
            time.sleep(0.01)
        filler.unlink()
        err = process.communicate(timeout=300)[1]
        assert process.returncode == 0, err[-2000:]
        is_as_if_nothing_had_happened(disk / "full", simple)
