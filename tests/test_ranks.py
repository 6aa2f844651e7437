"""Several processes as one: gradients, segments, one error, and going on with another number of them."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import rank_worker
from helpers.running import command, epochs, losses, mark_damaged, run, run_ranks, start, wait_for_step

from simsiam_dali.common import distributed
from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.data.shards import open_shards
from simsiam_dali.training import checkpoint
from simsiam_dali.training.learner import Learner, learning_rates
from simsiam_dali.training.micro_batch import candidates
from simsiam_dali.training.world_size import rescale_batch_size

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
WORKER = Path(rank_worker.__file__)


def launched(processes: int, args: list[str]) -> list[str]:
    """A command of `python ...` under torchrun."""
    return [*TORCHRUN, "--standalone", "--nproc-per-node", str(processes), *args[1:]]


@pytest.fixture(scope="module")
def alone(small_shards: Path) -> dict[str, Any]:
    """What one process does with the whole batch."""
    return rank_worker.measure(open_shards(small_shards), World(0, 1, torch.device("cpu")))


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.faults)])
def ranks(request: pytest.FixtureRequest, small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What several do, with equal parts of it each."""
    folder = tmp_path_factory.mktemp("ranks")
    script = [sys.executable, str(WORKER), str(small_shards), str(folder / "out.pt")]
    for done in run_ranks(request.param, script, folder):
        assert done.returncode == 0, done.stderr[-3000:]
    return request.param, torch.load(folder / "out.pt", weights_only=True)


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of two tensors of one name."""
    assert ours.keys() == theirs.keys()
    pairs = [(ours[n].double(), theirs[n].double()) for n in theirs]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs if b.any())


@pytest.mark.parametrize("encoder", ["simsiam", "simple", "contrastive", "joint", "byol"])
def test_the_gradients_are_those_of_one_process_with_the_whole_batch(
    ranks: Any, alone: dict[str, Any], encoder: str
) -> None:
    ours, theirs = ranks[1]["steps"][encoder], alone["steps"][encoder]
    assert all(gradient.any() for gradient in theirs["gradients"].values())
    assert difference(ours["gradients"], theirs["gradients"]) < 1e-4
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-5)
    running = [name for name in theirs["state"] if "running" in name]
    assert running
    for name in running:
        torch.testing.assert_close(ours["state"][name], theirs["state"][name], rtol=1e-4, atol=1e-6)


def test_without_sync_bn_they_are_not(ranks: Any, alone: dict[str, Any]) -> None:
    apart, whole = ranks[1]["steps"]["apart"], alone["steps"]["apart"]
    assert difference(apart["gradients"], whole["gradients"]) > 1e-2


def test_all_validate_with_the_statistics_that_are_saved(ranks: Any) -> None:
    before, shared = ranks[1]["statistics"]["before"], ranks[1]["statistics"]["shared"]
    assert not torch.equal(before[0], before[1])
    assert all(torch.equal(own, before[0]) for own in shared)


def test_sync_bn_is_refused_on_cpus(small_shards: Path) -> None:
    with pytest.raises(UserError, match="on GPUs only"):
        Learner(
            load_config(assignments=["train.sync_bn=true"]), open_shards(small_shards), World(0, 2, torch.device("cpu"))
        )


def test_batches_may_differ_in_size(ranks: Any) -> None:
    number, found = ranks[0], ranks[1]["uneven"]
    each = [[100 * rank + i for i in range(rank + 2)] for rank in range(number)]
    whole = torch.tensor(list(chain.from_iterable(each)), dtype=torch.float32).unsqueeze(1)
    assert torch.equal(found["rows"], whole)
    weights = iter(range(len(whole)))  # every rank's loss is the whole sum, so the gradients of all add up
    assert found["gradients"] == [[float(number * next(weights)) for _ in rows] for rows in each]
    norm = torch.nn.BatchNorm1d(1, affine=False)
    assert list(chain.from_iterable(found["normalised"])) == pytest.approx(norm(whole).flatten().tolist(), abs=1e-5)
    torch.testing.assert_close(found["running_var"], norm.running_var)


def test_each_segment_comes_once_an_epoch_over_all_ranks(ranks: Any, small_shards: Path) -> None:
    """In every epoch; the fewer than a step has that it leaves out are other ones each time."""
    number, result = ranks
    count = open_shards(small_shards).count("train")
    steps = count // rank_worker.SEGMENTS
    for epoch in range(rank_worker.EPOCHS):
        parts = [of_rank[epoch] for of_rank in result["segments"]]
        assert [len(part) for part in parts] == [steps * rank_worker.SEGMENTS // number] * number
        assert len(set(chain.from_iterable(parts))) == steps * rank_worker.SEGMENTS


# --- going on with another number of processes

SHARED = {"mlflow__enabled": "false", "encoder__epochs": 3}


def check_whole(run_dir: Path, processes: int, whole_epochs: int = 3) -> None:
    """The run has come to its end as if it had always been one: every step once, the settings of its last processes."""
    saved = checkpoint.load(run_dir / checkpoint.FILE_NAME)
    total = len(losses(run_dir))
    assert (saved["epoch"], saved["step"], total % whole_epochs) == (whole_epochs, total, 0)
    assert list(losses(run_dir)) == list(range(1, total + 1))
    assert [record["epoch"] for record in epochs(run_dir)] == list(range(whole_epochs + 1))
    assert len(saved["loaders"]) == processes
    settings = load_config(run_dir / "config.yaml")
    assert settings.encoder.batch_size * processes == 8
    decayed, fixed = (group["lr"] for group in saved["learner"]["optimizer"]["param_groups"])
    assert (decayed, fixed) == pytest.approx(learning_rates(settings, total - 1, total // whole_epochs, 8))


def test_on_gpus_tensors_of_the_cpu_are_exchanged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch's segments are on the CPU, which NCCL does not take: look at what torch is asked for."""
    joined: list[str] = []
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", joined.append)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with distributed.process_group("gpu") as world:
        assert (world.rank, world.size, world.gpu) == (1, 2, 1)
    (backend,) = joined
    assert dict(part.split(":") for part in backend.split(",")) == {"cpu": "gloo", "cuda": "nccl"}


STOPPED_WHILE_IT_REPORTS = """
import contextlib, signal
import torch.distributed as dist
from simsiam_dali.common import distributed
from simsiam_dali.common.errors import one_line_errors
from simsiam_dali.common.signals import Interrupt

dist.init_process_group = lambda _: None
dist.destroy_process_group = lambda: signal.raise_signal(signal.SIGTERM)
distributed.reports_first = lambda: signal.raise_signal(signal.SIGTERM) or True

@contextlib.contextmanager
def outside():
    try:
        yield
    except Exception:
        signal.raise_signal(signal.SIGTERM)
        raise

@one_line_errors
@distributed.report_error_once
def main():
    with distributed.process_group("cpu"), outside(), Interrupt():
        raise dist.DistError

main()
"""


def test_torchrun_s_sigterm_does_not_cut_off_the_report_of_an_error(tmp_path: Path) -> None:
    """It comes at any moment after another rank died: at each step of the way out of the failed collective call."""
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    done = run([sys.executable, "-c", STOPPED_WHILE_IT_REPORTS], tmp_path, **env)
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: another rank died")


def test_two_processes_train_one_model_and_one_continues_it(tmp_path: Path, small_shards: Path) -> None:
    args = command(tmp_path, small_shards, encoder__batch_size=4, **{**SHARED, "encoder__epochs": 2})
    done = run(launched(2, args), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (run_dir,) = (tmp_path / "runs").iterdir()
    saved = checkpoint.load(run_dir / checkpoint.FILE_NAME)
    steps = saved["step"] // 2
    assert len(losses(run_dir)) == saved["step"]
    assert saved["loaders"][0] != saved["loaders"][1]

    # as if three epochs were to be made, and it had been stopped in the middle of the second
    saved["config"]["encoder"]["epochs"] = 3
    saved["epoch"], saved["step"] = 1, steps + 2
    checkpoint.save(saved, run_dir / checkpoint.FILE_NAME)
    resume = [sys.executable, "-m", "simsiam_dali.train", "--resume", str(run_dir)]
    refused = run_ranks(3, resume, tmp_path)
    assert [rank.returncode for rank in refused] == [1, 1, 1]
    assert [line for rank in refused for line in rank.stderr.splitlines() if line.startswith("error: ")] == [
        "error: a step of this run has 8 segments, which 3 processes cannot share evenly, 2 or more each: continue with"
        " 1, 2, 4"
    ]
    done = run(resume, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = f"saved after step {steps + 2} by 2 processes, now 1 with 8 segments a step each: epoch 2 from its start"
    assert said in done.stdout
    check_whole(run_dir, 1)


def test_a_step_keeps_its_segments() -> None:
    settings = load_config(assignments=["encoder.batch_size=6"])
    assert rescale_batch_size(settings, before=2, now=1).encoder.batch_size == 12
    assert rescale_batch_size(settings, before=2, now=6).encoder.batch_size == 2
    with pytest.raises(UserError, match="12 segments, which 8 processes cannot share evenly"):
        rescale_batch_size(settings, before=2, now=8)
    with pytest.raises(UserError, match=r"continue with 1, 2, 3, 4, 6$"):
        rescale_batch_size(settings, before=2, now=12)  # one segment has no batch statistics


def test_micro_batches_follow_the_number_of_processes() -> None:
    settings = load_config(assignments=["encoder.batch_size=6", "train.micro_batch=2"])
    assert rescale_batch_size(settings, before=2, now=1).train.micro_batch == 2
    assert rescale_batch_size(settings, before=2, now=4).train.micro_batch == 3  # of 3 there are no smaller ones
    # A loss that compares all segments of a step takes them at once, whatever the step's size.
    whole = load_config(assignments=["encoder.encoder_type=contrastive", "encoder.batch_size=6", "train.micro_batch=6"])
    for now, size in ((1, 12), (3, 4)):
        rescaled = rescale_batch_size(whole, before=2, now=now)
        assert candidates(rescaled) == [size]


def worker(launcher: int, rank: int) -> int:
    """Process id of a rank that torchrun started."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"rank {rank} is not running")


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable, 10.77.0.1 and 10.77.0.2: to torchrun two hosts with one disk."""
    names = [f"simsiam{os.getpid()}{end}" for end in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
            for number, name in enumerate(names, start=1):
                ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
                for link in ("lo", "eth0"):
                    ip("-n", name, "link", "set", link, "up")
        except (OSError, subprocess.CalledProcessError) as e:
            pytest.skip(f"no network namespaces or no veth here ({getattr(e, 'stderr', e)})")
        yield names
    finally:
        with contextlib.suppress(OSError):  # there is no `ip`
            for name in names:
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.faults
def test_two_hosts_train_one_model(hosts: list[str], tmp_path: Path, small_shards: Path) -> None:
    args = command(tmp_path, small_shards, encoder__batch_size=4, **SHARED)
    nodes = []
    for number, name in enumerate(hosts, start=1):
        torchrun = [
            *("ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=eth0"),
            *(*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-conf", f"is_host={number == 1}"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29500", "--rdzv-id", "test"),
            *("--local-addr", f"10.77.0.{number}", *args[1:]),
        ]
        nodes.append(start(torchrun, tmp_path))
    said = [node.communicate(timeout=900) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], [err[-2000:] for _, err in said]
    (run_dir,) = (tmp_path / "runs").iterdir()
    check_whole(run_dir, 2)


@pytest.mark.faults
def test_a_killed_rank_ends_all_with_one_error_and_any_number_continues(tmp_path: Path, small_shards: Path) -> None:
    """4 processes, one killed; 2, the one that writes killed; 1, killed; 2 to the end."""
    nine = SHARED | {"encoder__epochs": 9}  # of two steps each
    args = command(tmp_path, small_shards, encoder__batch_size=2, train__checkpoint_every=1, **nine)
    resume = [sys.executable, "-m", "simsiam_dali.train", "--resume", "--set", f"train.runs_dir={tmp_path}/runs"]
    for processes, rank, step in ((4, 1, 2), (2, 0, 6)):
        launcher = start(launched(processes, args), tmp_path)
        wait_for_step(launcher, tmp_path / "runs", step)
        os.kill(worker(launcher.pid, rank), signal.SIGKILL)
        _, err = launcher.communicate(timeout=120)
        assert launcher.returncode == 1
        (said,) = (line for line in err.splitlines() if line.startswith("error: "))
        assert "another rank died" in said
        assert err.count("Traceback") == 1  # torchrun's own, of its report
        assert err.index("error: ") < err.index("Traceback") < err.index("ChildFailedError")
        assert "(SIGKILL)" in err
        args = resume
    alone = start(args, tmp_path)
    wait_for_step(alone, tmp_path / "runs", 10)
    alone.kill()
    out, _ = alone.communicate()
    assert re.search(r"by 2 processes, now 1 with 8 segments a step each: epoch \d from its start, in a new order", out)
    done = run(launched(2, resume), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"by 1 processes, now 2 with 4 segments a step each: epoch \d from its start", done.stdout)
    (run_dir,) = (tmp_path / "runs").iterdir()
    check_whole(run_dir, 2, whole_epochs=9)


@pytest.mark.faults
def test_damaged_segments_under_torchrun_and_a_resume(tmp_path: Path, small_shards: Path) -> None:
    """Two ranks, a segment that fails when the log-mel is measured and one in training; a rank killed in epoch 2."""
    shards = open_shards(Path(shutil.copytree(small_shards, tmp_path / "shards")))
    bad = [1, shards.count("train") - 2]
    for row in bad:
        mark_damaged(shards, row)
    over = SHARED | {"encoder__batch_size": 4, "data__max_bad_fraction": 0.2, "train__checkpoint_every": 1}
    over |= {"data__stats_segments": 8}  # the first 8: not the second of the bad ones
    args = command(tmp_path, shards.root, "--run-name", "whole", **over)
    done = run(launched(2, args), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [done.stderr.count(f" {row:09d} (") for row in bad] == [1, 1]  # by the rank that met it, once
    lines = (shards.root / "quarantine.csv").read_text().splitlines()[1:]
    assert sorted(int(line.split(",")[3]) for line in lines) == bad
    whole = tmp_path / "runs/whole"
    check_whole(whole, 2)
    assert epochs(whole)[-1]["data/quarantined"] == 2

    (shards.root / "quarantine.csv").unlink()
    folder = tmp_path / "other"
    folder.mkdir()
    launcher = start(launched(2, command(folder, shards.root, "--run-name", "killed", **over)), folder)
    wait_for_step(launcher, folder / "runs", len(losses(whole)) // 3 + 1)
    killed = folder / "runs/killed"
    os.kill(worker(launcher.pid, 1), signal.SIGKILL)
    launcher.communicate(timeout=120)
    done = run(launched(2, [*args[:3], "--resume", str(killed)]), folder)
    assert done.returncode == 0, done.stderr[-3000:]
    check_whole(killed, 2)
    assert losses(killed) == losses(whole)
