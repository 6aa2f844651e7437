"""The A/B switch: both types through the one trainer, a third one as CONTRIBUTING.md says, and who chose the type."""

import csv
import re
import sys
from pathlib import Path

import mlflow
import pytest
import torch
from helpers.learned import same_artist_is_nearer
from helpers.running import command, epochs, losses, records, refusal, run, start, train, wait_for_step

from simsiam_dali.common.distributed import World
from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import EncoderConfig, setting_fields
from simsiam_dali.data.shards import open_shards
from simsiam_dali.models.registry import ENCODERS, encoder_type
from simsiam_dali.training import checkpoint
from simsiam_dali.training.data import create_loader, log_mel_settings
from simsiam_dali.training.loss_window import mean_over_ranks

ROOT = Path(__file__).resolve().parent.parent
SIMPLE = {"encoder__encoder_type": "simple", "encoder__embedding_dim": 16, "encoder__simple__base_channels": 4}


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> Path:
    """A whole run of the baseline."""
    folder = tmp_path_factory.mktemp("simple")
    done = run(command(folder, small_shards, "--run-name", "simple", **SIMPLE), folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs/simple"


def test_simple_is_tagged_measured_and_kept_like_simsiam(simple: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{simple.parent.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("music_recommendation")
    (found,) = client.search_runs([experiment.experiment_id], "tags.encoder_type = 'simple'")
    assert {
        "loss_type": "metadata_contrastive",
        "experiment_variant": "simple_metadata_contrastive",
    }.items() <= found.data.tags.items()
    assert "backbone" not in found.data.tags
    assert {
        "encoder/train_loss",
        "encoder/val_loss",
        "encoder/pairless_batches",
        "knn/artist",
        "training_time_hours",
    } <= set(found.data.metrics)
    written = {p.name for p in simple.iterdir()}
    assert written == {".lock", "checkpoint.pt", "checkpoint.previous.pt", "config.yaml", "curves.png", "metrics.jsonl"}


def test_simple_s_loss_falls(simple: Path) -> None:
    first, *_, last = [r["encoder/train_loss"] for r in epochs(simple)[1:]]
    assert last < first


def test_simple_learns_which_songs_are_by_one_artist(tmp_path: Path, small_shards: Path) -> None:
    """0.61 to 0.70 untrained and 0.90 to 0.97 trained, with three seeds."""
    over = SIMPLE | {"encoder__simple__base_channels": 8, "encoder__epochs": 20, "encoder__batch_size": 10}
    run_dir = train(tmp_path, small_shards, train__validate_every=100, encoder__learning_rate=0.004, **over)
    untrained, trained = (same_artist_is_nearer(run_dir, small_shards, trained) for trained in (False, True))
    assert trained > untrained + 0.1


@pytest.mark.parametrize("name", list(ENCODERS))
def test_a_type_names_the_sections_that_it_reads(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config, shards = load_config(assignments=[f"encoder.encoder_type={name}"]), open_shards(small_shards)
    accessed: set[str] = set()

    def recorded(section: EncoderConfig, attribute: str) -> object:
        accessed.add(attribute)
        return object.__getattribute__(section, attribute)

    monkeypatch.setattr(EncoderConfig, "__getattribute__", recorded)
    kind = encoder_type(config)
    kind.create(pretrained=False)
    kind.create_loss_fn(shards, torch.device("cpu"))
    sections = {key.split(".")[1] for key, _ in setting_fields() if key.startswith("encoder.") and key.count(".") > 1}
    assert accessed & sections == set(kind.sections)
    assert ("embedding_dim" in accessed) == kind.reads("encoder.embedding_dim")


@pytest.mark.parametrize(
    "own",
    [
        SIMPLE,
        {"encoder__encoder_type": "joint", "encoder__joint__views_loss": "simsiam"},
        {"encoder__encoder_type": "contrastive"},
        {"encoder__encoder_type": "byol"},
        {"encoder__encoder_type": "joint", "data__views": 3},
        {"data__short_views": 2, "data__short_view_seconds": 1.5},
    ],
    ids=["simple", "joint, SimSiam's loss", "contrastive", "byol", "joint, three views", "short views"],
)
def test_killed_and_resumed_is_as_if_never_stopped(
    own: dict[str, object], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, small_shards: Path
) -> None:
    whole = train(tmp_path_factory.mktemp("whole"), small_shards, **own)
    process = start(
        command(tmp_path, small_shards, train__checkpoint_every=2, mlflow__enabled="false", **own), tmp_path
    )
    wait_for_step(process, tmp_path / "runs", max(losses(whole)) // 2)
    process.kill()
    process.communicate()
    (run_dir,) = (tmp_path / "runs").iterdir()
    done = run([sys.executable, "-m", "simsiam_dali.train", "--resume", str(run_dir)], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(run_dir) == losses(whole)
    ours, theirs = (checkpoint.load(d / checkpoint.FILE_NAME)["learner"]["encoder"] for d in (run_dir, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_switch_and_its_source_is_printed(tmp_path: Path, small_shards: Path) -> None:
    over = {k: v for k, v in SIMPLE.items() if k != "encoder__encoder_type"} | {"encoder__epochs": 1}
    args = command(tmp_path, small_shards, "--encoder-type", "simple", **over)
    done = run(args, tmp_path, ENCODER_TYPE="simsiam")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "encoder.encoder_type = simple (command line), over simsiam (environment ENCODER_TYPE)" in done.stdout


def test_the_environment_chooses_and_an_unknown_type_is_refused_with_the_known_ones(
    tmp_path: Path, small_shards: Path
) -> None:
    line = refusal(command(tmp_path, small_shards), tmp_path, ENCODER_TYPE="simpel")
    assert "'simpel'" in line
    assert "byol, contrastive, joint, simple, simsiam" in line


def test_the_same_shards_and_songs_for_both_types(small_shards: Path) -> None:
    shards = open_shards(small_shards)
    rows = {}
    for name in ("simple", "simsiam"):
        settings = load_config(
            command_line={"encoder.encoder_type": name, "data.shards": small_shards, "data.threads": 1,
                          "data.view_seconds": 1.5, "encoder.batch_size": 4,
                          "encoder.simsiam.augmentation.time_mask_param": 10}
        )  # fmt: skip
        kind = encoder_type(settings)
        here = World(0, 1, torch.device("cpu"))
        loader = create_loader(settings, shards, log_mel_settings(settings), here, "train", kind.batches, shuffled=True)
        batches = list(loader)
        shapes = kind.input_shapes(log_mel_settings(settings), 1.5)
        assert [tuple(x.shape[1:]) for x in batches[0].inputs] == shapes
        rows[name] = [b.segment.tolist() for b in batches]
    assert rows["simple"] == rows["simsiam"]


def test_a_loss_is_the_mean_over_the_ranks_that_had_one() -> None:
    assert mean_over_ranks([(2.0, 1.0), (0.0, 0.0)]) == 2.0
    assert mean_over_ranks([(2.0, 1.0), (4.0, 1.0)]) == 3.0
    assert mean_over_ranks([(0.0, 0.0)]) is None


def test_batches_without_a_pair_are_counted_reported_and_excluded_from_the_mean(
    tmp_path: Path, small_shards: Path
) -> None:
    # Two segments a batch, and only songs of one year within 0 years pair: most batches hold no pair.
    over = SIMPLE | {"encoder__batch_size": 2, "encoder__epochs": 1}
    options = ("--set", "encoder.simple.use_artist=false", "--set", "encoder.simple.use_album=false",
               "--set", "encoder.simple.use_year=true", "--set", "encoder.simple.year_threshold=0")  # fmt: skip
    done = run(command(tmp_path, small_shards, "--run-name", "few", *options, **over), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    every = records(tmp_path / "runs/few")
    losses = [r["loss"] for r in every if "loss" in r]
    epoch = every[-1]
    share = sum(loss is None for loss in losses) / len(losses)
    assert share > 0
    assert epoch["encoder/pairless_batches"] == pytest.approx(share)
    counted = [loss for loss in losses if loss is not None]
    if counted:
        assert epoch["encoder/train_loss"] == pytest.approx(sum(counted) / len(counted))
    assert ("had no positive pair" in done.stdout) == (share > 0.5)


def test_a_third_type_is_a_file_and_an_entry_as_contributing_says(tmp_path: Path, small_shards: Path) -> None:
    module, entry = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    script = "\n".join(
        [module, entry, "from simsiam_dali import train", "train.main()"]
    )  # fmt: skip
    (tmp_path / "with_third.py").write_text(script)
    _, _, _, *options = command(tmp_path, small_shards, "--encoder-type", "third", encoder__epochs=2)
    done = run([sys.executable, "with_third.py", *options], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "third linear on cpu" in done.stdout
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("music_recommendation")
    (found,) = client.search_runs([experiment.experiment_id], "tags.encoder_type = 'third'")
    assert found.data.tags["experiment_variant"] == "third_info_nce"


def test_compare_shows_both_types_after_both_ran_on_one_set_of_shards(simple: Path, small_shards: Path) -> None:
    """Every metric that was computed, and the names of those that were not."""
    folder = simple.parent.parent
    done = run(command(folder, small_shards, "--run-name", "simsiam", encoder__epochs=1), folder)
    assert done.returncode == 0, done.stderr[-2000:]
    compare = [sys.executable, "-m", "simsiam_dali.compare", "--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    done = run(compare, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = list(csv.DictReader((folder / "runs/compare.csv").read_text().splitlines()))
    assert {row["encoder_type"] for row in rows} == {"simple", "simsiam"}
    for name in ("encoder/train_loss", "encoder/val_loss", "training_time_hours", "knn/artist"):
        assert all(float(row[name]) == float(row[name]) for row in rows), name
    for name in ("classifier/val_mse", "classifier/val_mae", "classifier/val_correlation"):
        assert any(name in line for line in done.stdout.splitlines() if "missing" in line), done.stdout
