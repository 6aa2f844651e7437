"""The training run as a whole: same seed same losses, killed and resumed, what is written, and what is refused."""

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import mlflow
import pytest
import torch
from helpers import fork_server
from helpers.running import PATIENT, TINY, command, epochs, losses, refusal, run, start, train, wait_for_step

from simsiam_dali.common.files import locked
from simsiam_dali.config.load import load_config, replace_settings
from simsiam_dali.config.schema import Config
from simsiam_dali.embedding.run import read_run
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training import checkpoint
from simsiam_dali.training.learner import create_optimizer, describe_optimizer, learning_rates


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Path:
    """A run that was never stopped."""
    return train(tmp_path_factory.mktemp("whole"), small_shards)


def test_one_seed_gives_the_same_losses_and_another_does_not(whole: Path, tmp_path: Path, small_shards: Path) -> None:
    (tmp_path / "again").mkdir()
    again = train(tmp_path / "again", small_shards)
    assert losses(again) == losses(whole)
    assert epochs(again) == epochs(whole)
    (tmp_path / "other").mkdir()
    other = train(tmp_path / "other", small_shards, "--seed", "1", encoder__epochs=1)
    assert losses(other)[1] != losses(whole)[1]


@pytest.mark.parametrize("checkpoint_every", [0, 2])
def test_killed_and_resumed_is_as_if_never_stopped(
    whole: Path, tmp_path: Path, small_shards: Path, checkpoint_every: int
) -> None:
    """SIGKILL in the first epoch, at its end, and in the last one; the losses, scores and weights come out the same."""
    total = max(losses(whole))
    over = {"mlflow__enabled": "false", "train__checkpoint_every": checkpoint_every}
    args = command(tmp_path, small_shards, **over)
    for step in (1, total // 3, total - 2):
        process = start(args, tmp_path)
        wait_for_step(process, tmp_path / "runs", step)
        process.kill()
        process.communicate()
        args = command(tmp_path, small_shards, "--resume", **over)
    done = run(args, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert losses(run_dir) == losses(whole)
    assert epochs(run_dir) == epochs(whole)
    ours, theirs = (checkpoint.load(d / checkpoint.FILE_NAME)["learner"]["encoder"] for d in (run_dir, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_goes_on_where_its_shards_have_moved_to(whole: Path, tmp_path: Path, small_shards: Path) -> None:
    before, after = shutil.copytree(small_shards, tmp_path / "before"), tmp_path / "after"
    over = {"mlflow__enabled": "false", "train__checkpoint_every": 1}
    process = start(command(tmp_path, before, **over), tmp_path)
    wait_for_step(process, tmp_path / "runs", 3)
    process.kill()
    process.communicate()
    before.rename(after)
    done = run(command(tmp_path, after, "--resume", **over), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert losses(run_dir) == losses(whole)
    assert checkpoint.load(run_dir / checkpoint.FILE_NAME)["config"]["data"]["shards"] == str(after)


def test_a_complete_run_remembers_where_its_shards_have_moved_to(
    whole: Path, tmp_path: Path, small_shards: Path
) -> None:
    shutil.copytree(whole.parent, tmp_path / "runs")
    after = Path(shutil.copytree(small_shards, tmp_path / "after"))
    path = tmp_path / "runs" / whole.name / checkpoint.FILE_NAME
    known, before = read_run(str(path)).sha256, checkpoint.load(path)
    resume = [sys.executable, "-m", "simsiam_dali.train", "--resume", str(path), "--set", "mlflow.enabled=false"]
    assert run([*resume, "--shards", str(after)], tmp_path).returncode == 0
    moved, saved, content = read_run(str(path)), checkpoint.load(path), path.read_bytes()
    assert moved.config.data.shards == after
    assert moved.sha256 == known  # or tables made before would be refused
    assert saved["config"] == before["config"] | {"data": before["config"]["data"] | {"shards": str(after)}}
    assert all(torch.equal(saved["learner"]["encoder"][n], w) for n, w in before["learner"]["encoder"].items())
    assert (saved["epoch"], saved["step"], saved["seconds"]) == (before["epoch"], before["step"], before["seconds"])
    assert run(resume, tmp_path).returncode == 0
    assert path.read_bytes() == content


DRAWING = """
import sys
import torch
from simsiam_dali import train
from simsiam_dali.training.learner import Learner
step = Learner.step
def drawing_step(self, *arguments):
    scored = step(self, *arguments)
    return scored._replace(loss=scored.loss + torch.rand(()))
Learner.step = drawing_step
sys.exit(train.main())
"""


def test_a_model_that_draws_random_numbers_is_resumed_with_the_same(tmp_path: Path, small_shards: Path) -> None:
    """As one with dropout would; SimSiam's and simple's draw none."""
    over = {"mlflow__enabled": "false", "encoder__epochs": 2, "train__checkpoint_every": 1}
    drawn = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        args = command(folder, small_shards, "--run-name", "drawing", **over)
        process = start([args[0], "-c", DRAWING, *args[3:]], folder)
        if name == "killed":
            wait_for_step(process, folder / "runs", 3)
            process.kill()
            process.wait()
            process = start([args[0], "-c", DRAWING, "--resume", "runs/drawing"], folder)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-2000:]
        drawn.append(losses(folder / "runs/drawing"))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_in_the_middle_of_an_epoch(
    whole: Path, tmp_path: Path, small_shards: Path, number: signal.Signals
) -> None:
    args = command(tmp_path, small_shards, mlflow__enabled="false", train__log_every=100)
    process = start([args[0], "-c", PATIENT, *args[3:]], tmp_path)
    while not list(tmp_path.glob("runs/*/checkpoint.pt")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)  # after the untrained evaluation, before or in the first step
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err[-2000:]
    (run_dir,) = (tmp_path / "runs").iterdir()
    saved = checkpoint.load(run_dir / checkpoint.FILE_NAME)
    assert 0 < saved["step"] < len(losses(whole))
    assert f"stopped after step {saved['step']}" in out
    done = run(
        command(tmp_path, small_shards, "--resume", str(run_dir), mlflow__enabled="false", train__log_every=1), tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(run_dir) == losses(whole)


def test_what_a_run_writes(whole: Path) -> None:
    written = {p.name for p in whole.iterdir()}
    assert written == {".lock", "checkpoint.pt", "checkpoint.previous.pt", "config.yaml", "curves.png", "metrics.jsonl"}
    assert load_config(whole / "config.yaml").encoder.batch_size == TINY["encoder.batch_size"]
    found = epochs(whole)
    assert [r["epoch"] for r in found] == [0, 1, 2, 3]  # 0 is the untrained encoder
    for name in ("encoder/val_loss", "knn/artist", "knn/genre", "knn/rating_mae", "knn/artist_chance"):
        assert all(r[name] is not None for r in found), name
    for name in ("encoder/train_loss", "encoder/z_std", "encoder/effective_rank"):
        assert all(r[name] is not None for r in found[1:]), name
    per_epoch = len(losses(whole)) // 3
    mean = sum(losses(whole)[s] for s in range(1, per_epoch + 1)) / per_epoch
    assert found[1]["encoder/train_loss"] == pytest.approx(mean)
    assert all(-1 <= loss <= 1 for loss in losses(whole).values())


def test_the_checkpoint_holds_the_data_set_s_statistics(whole: Path) -> None:
    saved = checkpoint.load(whole / checkpoint.FILE_NAME)
    assert -90 < saved["log_mel"]["mean"] < 40
    assert 5 < saved["log_mel"]["std"] < 40


def test_the_predictor_s_rate_stays_and_the_encoder_s_falls(whole: Path) -> None:
    encoder, predictor = checkpoint.load(whole / checkpoint.FILE_NAME)["learner"]["optimizer"]["param_groups"]
    batch = TINY["encoder.batch_size"]
    assert isinstance(batch, int)
    base = load_config(whole / "config.yaml").encoder.simsiam.learning_rate * batch / 256
    assert predictor["lr"] == pytest.approx(base)
    assert encoder["lr"] < 0.05 * base


def test_the_optimizer_is_described_with_the_rate_and_where_that_is_from() -> None:
    """encoder.learning_rate of a config for `simple` is for 256 segments of an encoder that is trained by SGD."""
    assert describe_optimizer(Config(), 128) == "sgd, learning rate 0.015 (0.03 for 256 segments)"
    given = replace_settings(Config(), encoder__learning_rate=0.001)
    overridden = ", from encoder.learning_rate in place of the type's own"
    assert describe_optimizer(given, 64) == f"sgd, learning rate 0.00025 (0.001 for 256 segments){overridden} 0.03"
    simple = replace_settings(given, encoder__encoder_type="simple")
    assert describe_optimizer(simple, 64) == f"adamw, learning rate 0.001{overridden} 0.001"


def test_learning_rates_follow_the_cosine_and_the_warm_up() -> None:
    settings = load_config(
        assignments=["encoder.epochs=10", "encoder.simsiam.warmup_epochs=2", "encoder.simsiam.learning_rate=0.05"]
    )
    rates = [learning_rates(settings, step, 100, 512) for step in range(1000)]
    assert all(fixed == pytest.approx(0.1) for _, fixed in rates)
    assert rates[0][0] == pytest.approx(0.1 / 201)
    assert rates[200][0] == pytest.approx(0.1)  # the warm-up's end
    assert rates[600][0] == pytest.approx(0.05)  # half way down the cosine
    assert 0 < rates[999][0] < 1e-5
    assert all(a[0] < b[0] for a, b in pairwise(rates[:200]))
    assert all(a[0] > b[0] for a, b in pairwise(rates[200:]))


@pytest.mark.parametrize(
    ("assignments", "base"),
    [
        ((), 0.03 * 2),  # SGD: scaled by batch / 256
        (("encoder.simsiam.optimizer=adamw", "encoder.simsiam.learning_rate=0.002"), 0.002),
        (("encoder.encoder_type=simple",), 0.001),
        (("encoder.encoder_type=simple", "encoder.learning_rate=0.004"), 0.004),  # one rate for either type
        (("encoder.learning_rate=0.004",), 0.008),
    ],
)
def test_the_base_learning_rate_is_the_type_s_own_unless_one_is_given_for_all(
    assignments: tuple[str, ...], base: float
) -> None:
    rate, fixed = learning_rates(load_config(assignments=assignments), 0, 100, 512)
    assert rate == pytest.approx(base)
    assert fixed == pytest.approx(base)


def test_fix_predictor_lr_off_marks_no_group() -> None:
    settings = load_config(assignments=["encoder.simsiam.fix_predictor_lr=false", "encoder.simsiam.backbone=resnet18"])
    optimizer = create_optimizer(settings, encoder_type(settings).create())
    assert not any(group["fix_lr"] for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("type_", "settings", "expected"),
    [
        ("simsiam", ("sgd_momentum=0.5", "weight_decay=0.25"), {"momentum": 0.5, "weight_decay": 0.25}),
        ("simsiam", ("sgd_momentum=0",), {"momentum": 0, "weight_decay": 5e-4}),
        ("simsiam", ("optimizer=adamw", "weight_decay=0.25"), {"betas": (0.9, 0.999), "weight_decay": 0.25}),
        ("simple", ("weight_decay=0.25",), {"betas": (0.9, 0.999), "weight_decay": 0.25}),
    ],
)
def test_momentum_and_weight_decay_reach_every_group(
    type_: str, settings: tuple[str, ...], expected: dict[str, object]
) -> None:
    chosen = [f"encoder.{type_}.{setting}" for setting in settings]
    config = load_config(assignments=[f"encoder.encoder_type={type_}", "encoder.simsiam.backbone=resnet18", *chosen])
    for group in create_optimizer(config, encoder_type(config).create()).param_groups:
        assert {name: group[name] for name in expected} == expected


def test_mlflow_gets_the_named_tags_only_and_no_checkpoint_where_none_is_wanted(
    tmp_path: Path, small_shards: Path
) -> None:
    wanted = {"mlflow__auto_tags": "[backbone,encoder_type]", "mlflow__log_checkpoint": "false"}
    done = run(command(tmp_path, small_shards, encoder__epochs=1, **wanted), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("music_recommendation")
    (found,) = client.search_runs([experiment.experiment_id])
    ours = {name for name in found.data.tags if not name.startswith("mlflow.")}
    assert ours == {"shards", "backbone", "encoder_type"}
    assert {f.path for f in client.list_artifacts(found.info.run_id)} == {"config.yaml", "curves.png"}


def test_mlflow_holds_parameters_tags_metrics_and_files(tmp_path: Path, small_shards: Path) -> None:
    done = run(command(tmp_path, small_shards, "--run-name", "tracked", encoder__epochs=1), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("music_recommendation")
    (found,) = client.search_runs([experiment.experiment_id], "tags.encoder_type = 'simsiam'")
    assert found.info.run_name == "tracked"
    assert found.info.status == "FINISHED"
    expected = {
        "encoder_type": "simsiam",
        "loss_type": "negative_cosine",
        "experiment_variant": "simsiam_negative_cosine",
        "backbone": "resnet18",
        "pretrained": "false",
    }
    assert expected.items() <= found.data.tags.items()
    assert found.data.params["encoder.simsiam.n_mels"] == "16"
    assert {"encoder/train_loss", "encoder/val_loss", "encoder/z_std", "knn/artist", "training_time_hours"} <= set(
        found.data.metrics
    )
    files = {f.path for f in client.list_artifacts(found.info.run_id)}
    assert files == {"config.yaml", "checkpoint.pt", "curves.png"}


def test_without_mlflow_it_is_not_imported(tmp_path: Path, small_shards: Path) -> None:
    args = command(tmp_path, small_shards, mlflow__enabled="false", encoder__epochs=1)
    code = """
import sys
from simsiam_dali import train
sys.argv = ["train", *sys.argv[1:]]
try:
    train.main()
finally:
    assert "mlflow" not in sys.modules
"""
    done = fork_server.fresh([sys.executable, "-c", code, *args[3:]], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_epoch_leaves_a_data_graph_behind(tmp_path: Path, small_shards: Path) -> None:
    script = """
import gc, sys
from simsiam_dali import train
from simsiam_dali.training import journal
from simsiam_dali.training import validation
validation.KEPT_BYTES = 0  # as with a large library, the graphs are made anew each time
gc.set_threshold(100_000_000)  # only what the run itself collects
line = journal.epoch_line
def told(record, epochs):
    print("objects", sum(str(type(x).__module__).startswith("nvidia.dali") for x in gc.get_objects()))
    return line(record, epochs)
journal.epoch_line = told
sys.exit(train.main())
"""
    args = command(tmp_path, small_shards, mlflow__enabled="false")
    done = run([sys.executable, "-c", script, *args[3:]], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [x for x in done.stdout.splitlines() if x.startswith("objects ")]
    assert len(counts) == 4
    assert len(set(counts)) == 1


def changed_shards(folder: Path, shards: Path) -> Path:
    shutil.copytree(shards, folder / "shards")
    return folder / "shards"


def test_refused_no_shards(tmp_path: Path) -> None:
    assert "no such folder; make them with python -m simsiam_dali.pack" in refusal(
        command(tmp_path, tmp_path / "nowhere"), tmp_path
    )
    (tmp_path / "empty").mkdir()
    assert "no shards in" in refusal(command(tmp_path, tmp_path / "empty"), tmp_path)


def test_refused_a_missing_index(tmp_path: Path, small_shards: Path) -> None:
    shards = changed_shards(tmp_path, small_shards)
    (shards / "train-000000.idx").unlink()
    assert "train-000000.idx is missing" in refusal(command(tmp_path, shards), tmp_path)


def test_refused_another_format_version(tmp_path: Path, small_shards: Path) -> None:
    shards = changed_shards(tmp_path, small_shards)
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    assert "format version 99" in refusal(command(tmp_path, shards), tmp_path)


def test_refused_a_shard_changed_since_packing(tmp_path: Path, small_shards: Path) -> None:
    shards = changed_shards(tmp_path, small_shards)
    content = bytearray((shards / "train-000000.tar").read_bytes())
    content[len(content) // 2] ^= 1
    (shards / "train-000000.tar").write_bytes(content)
    assert "has changed since packing" in refusal(command(tmp_path, shards), tmp_path)


def test_refused_a_batch_larger_than_the_data_set(tmp_path: Path, small_shards: Path) -> None:
    line = refusal(command(tmp_path, small_shards, encoder__batch_size=500), tmp_path)
    assert "a batch of 500 is larger than the data set" in line
    assert "--batch-size" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_refused_a_gpu_that_is_not_there(tmp_path: Path, small_shards: Path) -> None:
    assert "no CUDA device" in refusal(command(tmp_path, small_shards, train__device="gpu"), tmp_path)


def test_refused_a_server_that_does_not_answer(tmp_path: Path, small_shards: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]  # free once the socket is closed
    uri = f"http://127.0.0.1:{port}"
    args = command(tmp_path, small_shards)
    at = args.index(f"mlflow.tracking_uri=sqlite:///{tmp_path}/mlflow.db")
    line = refusal(args[: at - 1] + args[at + 1 :], tmp_path, MLFLOW_TRACKING_URI=uri)
    assert f"the MLflow server {uri} does not answer" in line


WITHOUT_LOCKS = """
import errno, os, sys
from contextlib import contextmanager
from simsiam_dali import train
from simsiam_dali.training import run
@contextmanager
def refused(*_, **__):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    yield
run.locked = refused
sys.exit(train.main())
"""
"""A training on a file system that has no locks."""


def test_a_folder_that_cannot_be_locked_is_trained_in_with_a_warning(tmp_path: Path, small_shards: Path) -> None:
    args = command(tmp_path, small_shards, "--run-name", "mine", mlflow__enabled="false", encoder__epochs=1)
    done = run([args[0], "-c", WITHOUT_LOCKS, *args[3:]], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if "cannot be locked" in line)
    folder = tmp_path / "runs/mine"
    assert line == f"warning: {folder} cannot be locked (No locks available): do not resume it while it trains"
    assert (folder / checkpoint.FILE_NAME).exists()


def test_a_run_that_another_process_trains_is_not_touched(whole: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(whole, tmp_path / "runs" / whole.name))
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with locked(run_dir / ".lock", wait=False):
        done = run([sys.executable, "-m", "simsiam_dali.train", "--resume", str(run_dir)], tmp_path)
    busy = f"error: another process is training in {run_dir}: wait until it ends, or stop it\n"
    assert (done.returncode, done.stderr) == (1, busy)
    assert {path.name: path.read_bytes() for path in run_dir.iterdir() if path.name in before} == before


def test_refused_a_run_that_exists_and_settings_a_resume_cannot_change(
    whole: Path, tmp_path: Path, small_shards: Path
) -> None:
    shutil.copytree(whole.parent, tmp_path / "runs")
    name = whole.name
    done = run(command(tmp_path, small_shards, "--run-name", name), tmp_path)
    assert done.returncode == 1
    assert "already holds a run" in done.stderr
    done = run(
        command(tmp_path, small_shards, "--resume", name, mlflow__enabled="false", encoder__learning_rate=1), tmp_path
    )
    assert done.returncode == 1
    assert "--resume cannot change encoder.learning_rate" in done.stderr
    done = run(command(tmp_path, small_shards, "--resume", f"runs/{name}/config.yaml"), tmp_path)
    assert done.returncode == 1
    assert "not a checkpoint" in done.stderr
    assert "previous" not in done.stderr
    done = run(command(tmp_path, small_shards, "--resume", "absent"), tmp_path)
    assert done.returncode == 1
    assert "neither a checkpoint" in done.stderr


@pytest.mark.parametrize("name", ["../mine", ".."])
def test_refused_a_run_name_that_is_a_path(tmp_path: Path, small_shards: Path, name: str) -> None:
    line = refusal(command(tmp_path, small_shards, "--run-name", name), tmp_path)
    assert f"train.run_name is {name}, which is no folder's name" in line


def test_help_shows_defaults() -> None:
    done = subprocess.run([sys.executable, "-m", "simsiam_dali.train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for word in ("--encoder-type", "--resume", "--set a.b=c", "default 128", "encoder.epochs"):
        assert word in done.stdout


def test_profile_and_measured_threads(tmp_path: Path, small_shards: Path) -> None:
    args = command(
        tmp_path,
        small_shards,
        "--profile",
        "2",
        "--run-name",
        "p",
        mlflow__enabled="false",
        data__threads="auto",
        encoder__batch_size=2,  # so that the traced steps lie within an epoch
    )
    done = run(args, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    chosen = load_config(tmp_path / "runs/p/config.yaml").data
    assert isinstance(chosen.threads, int)
    assert 1 <= chosen.threads <= len(os.sched_getaffinity(0))
    assert f"measured: {chosen.threads} DALI threads, {chosen.prefetch} batches ahead" in done.stdout
    with gzip.open(tmp_path / "runs/p/trace.json.gz", "rt") as f:
        names = [event.get("name") for event in json.load(f)["traceEvents"]]
    for part in ("data", "forward", "backward", "update"):
        assert names.count(part) == 2, part
    assert "aten::convolution_backward" in (tmp_path / "runs/p/profile.txt").read_text()
