"""The search for settings: what is refused, sampled and pruned, and that a study survives kills and is shared."""

import csv
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import optuna
import pytest
from helpers import fork_server
from helpers.running import PATIENT, TINY, command, run, start
from optuna.trial import FrozenTrial, TrialState

from simsiam_dali import hpo
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import Config
from simsiam_dali.evaluation.compare_runs import BEST_OF_TAG
from simsiam_dali.models.registry import ENCODERS
from simsiam_dali.search import report, trials
from simsiam_dali.search.report import StudyRun
from simsiam_dali.search.space import Space
from simsiam_dali.search.study import Study

ONE = {"encoder.simsiam.learning_rate": {"low": 0.01, "high": 1.0, "log": True}}
RUNNING: Any = SimpleNamespace(signal=0)


def make_config(folder: Path, space: dict[str, Any] | None = None, **over: object) -> Config:
    """Tiny settings without MLflow, everything written below `folder`."""
    values = {
        **TINY,
        "train.runs_dir": folder / "runs",
        "mlflow.enabled": False,
        "hpo.storage": f"sqlite:///{folder}/hpo.db",
        "hpo.epochs": 4,
        "hpo.space.simsiam": ONE if space is None else space,
        **{k.replace("__", "."): v for k, v in over.items()},
    }
    return load_config(command_line=values)


def make_study(config: Config, fingerprint: str = "0123456789abcdef") -> Study:
    return Study(config, fingerprint)


def fake_training(
    monkeypatch: pytest.MonkeyPatch,
    scores: Callable[[Config], list[float | None]],
    metric: str = "knn/artist",
    untrained: float | None = 0.9,
) -> list[Config]:
    """Replace training: its epochs have the scores that `scores` returns; returns the settings as they come."""
    trained: list[Config] = []

    def epochs(config: Config, *_: object) -> Iterator[dict[str, Any]]:
        trained.append(config)
        for epoch, score in enumerate([untrained, *scores(config)]):  # the untrained encoder's comes first
            yield {"epoch": epoch, metric: score}

    monkeypatch.setattr(trials, "epochs", epochs)
    return trained


def search(config: Config) -> Study:
    """Run the remaining trials of the study, in this process."""
    study = make_study(config)
    trials.search(study, StudyRun(study), RUNNING)
    return study


# --- what is refused before the first trial


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ({"encoder.simsiam.learning_rat": {"low": 1, "high": 2}}, "did you mean encoder.simsiam.learning_rate?"),
        ({"encoder.simsiam": {"low": 1, "high": 2}}, "encoder.simsiam: Input should be"),
        ({"encoder.simsiam.augmentation.noise_prob": {"low": 0.5, "high": 1.5}}, "less than or equal to 1"),
        ({"encoder.simsiam.n_mels": {"low": 4, "high": 64}}, "greater than or equal to 8"),
        ({"encoder.simsiam.backbone": {"choices": ["resnet18", "resnet51"]}}, "resnet18 | resnet34 | resnet50"),
        ({"encoder.simsiam.augmentation.pitch_shift_range": {"low": 1, "high": 2}}, "pitch_shift_range = 1.0"),
        ({"encoder.simsiam.augmentation.pitch_shift_range": {"around": 0, "low": 1, "high": 13}}, "at most 12"),
        ({"encoder.simsiam.learning_rate": {"low": 0.1}}, "high: Field required"),
        ({"encoder.simsiam.learning_rate": {"low": 0.1, "high": "x"}}, "high: Input should be a valid number"),
        ({"encoder.simsiam.learning_rate": {"low": 0.2, "high": 0.1}}, "must hold, but got (low=0.2, high=0.1)"),
        ({"encoder.simsiam.weight_decay": {"low": 0, "high": 1, "log": True}}, "`low > 0` must hold for `log=True`"),
        ({"encoder.simsiam.weight_decay": {"low": 0.1, "high": 1, "log": "maybe"}}, "log: Input should be a"),
        ({"encoder.simsiam.weight_decay": {"low": 0.1, "hihg": 1}}, "hihg: Extra inputs are not permitted"),
        ({"encoder.simsiam.weight_decay": {"choices": []}}, "choices: List should have at least 1 item"),
        ({"encoder.simsiam.weight_decay": {"choices": [1], "low": 0}}, "low: Extra inputs are not permitted"),
        ({"encoder.simple.base_channels": {"low": 8, "high": 64}}, "has no effect"),
        ({"encoder.embedding_dim": {"low": 8, "high": 64}}, "has no effect"),
        ({"encoder.epochs": {"low": 8, "high": 64}}, "trials are of one length, hpo.epochs"),
        ({"train.seed": {"low": 0, "high": 64}}, "only settings of data. and encoder."),
        ({}, "hpo.space.simsiam is empty"),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_searched_is_refused(tmp_path: Path, space: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as e:
        Space(make_config(tmp_path, space))
    assert expected in str(e.value)
    assert str(e.value).startswith("hpo.space.simsiam")
    assert "\n" not in str(e.value)


def test_a_learning_rate_that_another_setting_overrules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoder\.learning_rate is set and overrides"):
        Space(make_config(tmp_path, encoder__learning_rate=0.1))


@pytest.mark.parametrize("encoder_type", list(ENCODERS))
def test_the_default_spaces_hold_only_what_their_type_reads(encoder_type: str) -> None:
    section = ENCODERS[encoder_type].sections[0]
    space = Space(load_config(assignments=[f"encoder.encoder_type={encoder_type}"]))
    assert f"encoder.{section}.learning_rate" in space.dimensions
    assert f"encoder.{section}.weight_decay" in space.dimensions


@pytest.mark.parametrize("metric", ["encoder/val_loss", "encoder/train_loss"])
def test_a_loss_is_refused_as_the_metric(metric: str) -> None:
    with pytest.raises(UserError) as e:
        hpo.configure(hpo.build_parser().parse_args(["--device", "cpu", "--metric", metric]))
    assert f"command line: hpo.metric = '{metric}' is refused" in str(e.value)
    assert "a loss cannot judge trials: SimSiam's is lowest when the encoder has collapsed" in str(e.value)
    assert "allowed: knn/artist | knn/genre" in str(e.value)


# --- what is sampled


def test_sampled_values_become_settings_of_the_right_type(tmp_path: Path) -> None:
    augmentation = "encoder.simsiam.augmentation"
    space = Space(
        make_config(
            tmp_path,
            {
                "encoder.simsiam.weight_decay": {"low": "1e-5", "high": 1, "log": True},
                "encoder.simsiam.predictor_hidden_dim": {"low": 8, "high": 64, "log": True},
                f"{augmentation}.pitch_shift_range": {"around": 0.5, "low": 1, "high": 4},
                f"{augmentation}.noise_snr_range": {"choices": [[15, 30], [5, 30]]},
                "encoder.simsiam.pretrained_backbone": {"choices": [True, False, "weights.pt"]},
            },
        )
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(10):
        params = study.ask(space.distributions).params
        simsiam = space.config(params, encoder__epochs=7).encoder.simsiam
        assert simsiam.predictor_hidden_dim == params["encoder.simsiam.predictor_hidden_dim"]
        assert simsiam.weight_decay == params["encoder.simsiam.weight_decay"]
        low, high = simsiam.augmentation.pitch_shift_range
        assert low + high == pytest.approx(1)
        assert 2 <= high - low <= 8
        assert simsiam.augmentation.noise_snr_range in [(15, 30), (5, 30)]
        assert simsiam.pretrained_backbone in [True, False, Path("weights.pt")]
    assert space.config(params, encoder__epochs=7).encoder.epochs == 7
    distribution = space.distributions["encoder.simsiam.predictor_hidden_dim"]
    assert isinstance(distribution, optuna.distributions.IntDistribution)


def test_a_search_is_reproducible_when_stopped_and_continued_and_never_samples_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_training(monkeypatch, lambda config: [config.encoder.simsiam.learning_rate] * 4)
    sampled = []
    for name, totals in (("whole", [14]), ("pieces", [1, 5, 12, 14])):
        for total in totals:
            study = search(make_config(tmp_path / name, hpo__trials=total))
        sampled.append([t.params["encoder.simsiam.learning_rate"] for t in study.trials()])
    assert sampled[0] == sampled[1]
    assert len(set(sampled[0])) == 14
    other = search(make_config(tmp_path / "other", hpo__trials=3, train__seed=1))
    assert not {t.params["encoder.simsiam.learning_rate"] for t in other.trials()} & set(sampled[0])


def test_settings_that_were_tried_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = {"encoder.simsiam.projection_layers": {"choices": [2, 3]}}
    trained = fake_training(monkeypatch, lambda config: [0.1 * config.encoder.simsiam.projection_layers] * 4)
    study = search(make_config(tmp_path, space, hpo__trials=8))
    assert sorted(config.encoder.simsiam.projection_layers for config in trained) == [2, 3]
    assert len(study.trials()) == 8
    assert all("the same settings as trial" in t.user_attrs["reason"] for t in study.trials(TrialState.FAIL))


# --- the value of a trial, and pruning


def test_the_value_of_a_trial_is_the_mean_of_its_last_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_training(monkeypatch, lambda _: [1.0, 0.2, 0.3, 0.4])
    study = search(make_config(tmp_path, hpo__trials=1, hpo__mean_epochs=3))
    (done,) = study.trials()
    assert done.value == pytest.approx(0.3)
    assert done.intermediate_values == pytest.approx({1: 1.0, 2: 0.6, 3: 0.5, 4: 0.3})


@pytest.mark.parametrize(("metric", "best"), [("knn/artist", 2), ("knn/rating_mae", 1)])
def test_the_best_is_the_highest_score_or_the_lowest_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, best: int
) -> None:
    values = iter([0.5, 0.1, 0.9, 0.9])
    fake_training(monkeypatch, lambda _: [next(values)] * 4, metric)
    study = search(make_config(tmp_path, hpo__trials=4, hpo__metric=metric, hpo__pruner__kind="none"))
    found = study.best()
    assert found is not None
    assert found.number == best
    chosen = load_config(study.folder / report.BEST)
    assert chosen.encoder.simsiam.learning_rate == found.params["encoder.simsiam.learning_rate"]
    assert chosen.encoder.epochs == study.config.encoder.epochs  # as any training


def test_the_file_of_the_best_settings_says_that_its_value_is_optimistic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_training(monkeypatch, lambda config: [config.encoder.simsiam.weight_decay] * 4)
    search(make_config(tmp_path, hpo__trials=2, hpo__study_name="mine"))
    best = tmp_path / "runs/hpo/mine/best.yaml"
    comment = [line for line in best.read_text().splitlines() if line.startswith("#")]
    assert comment[1].startswith("# That value is optimistic: all trials were scored on the same validation songs")
    assert len(comment) == 3
    load_config(best)


def test_a_trial_below_the_median_is_pruned_after_the_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.4, 0.5, 0.6, 0.1, 0.7])
    fake_training(monkeypatch, lambda _: [next(values)] * 4)
    pruner: dict[str, Any] = {"hpo__pruner__startup_trials": 3, "hpo__pruner__warmup_epochs": 2}
    study = search(make_config(tmp_path, hpo__trials=5, **pruner))
    states = [t.state for t in study.trials()]
    assert states == [TrialState.COMPLETE] * 3 + [TrialState.PRUNED, TrialState.COMPLETE]
    assert study.trials()[3].last_step == 2
    assert "pruned after epoch 2" in report.trial_line(study, 3)
    assert "best 0.700 (trial 4)" in report.trial_line(study, 3)


# --- failures


def test_the_search_survives_failed_trials_while_some_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fates = iter([None, None, 0.3, None, None, None, 0.4])

    def scores(_: Config) -> list[float | None]:
        if (score := next(fates)) is None:
            raise UserError("the loss is not finite")
        return [score] * 4

    fake_training(monkeypatch, scores)
    study = search(make_config(tmp_path, hpo__trials=7))
    assert [t.state == TrialState.FAIL for t in study.trials()] == [True, True, False, True, True, True, False]
    assert study.trials()[0].user_attrs["reason"] == "the loss is not finite"
    with (study.folder / report.TABLE).open() as f:
        rows = list(csv.DictReader(f))
    assert [row["state"] for row in rows] == [t.state.name for t in study.trials()]
    assert rows[0]["reason"] == "the loss is not finite"


@pytest.mark.parametrize(("metric", "untrained"), [("knn/artist", 0.9), ("knn/rating_correlation", None)])
def test_failures_alone_end_the_search_with_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, untrained: float | None
) -> None:
    trained = fake_training(monkeypatch, lambda _: [None] * 4, metric, untrained)
    with pytest.raises(UserError, match=rf"3 trials failed and none succeeded.* {metric} has no value on these shards"):
        search(make_config(tmp_path, hpo__trials=7, hpo__metric=metric))
    assert len(trained) == 3


def test_a_collapsed_trial_has_no_correlation_with_the_ratings_and_does_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = "knn/rating_correlation"
    scores: Iterator[list[float | None]] = iter([[0.3, None, None, None], [0.3, 0.4, 0.5, 0.6]])
    fake_training(monkeypatch, lambda _: next(scores), metric)
    study = search(make_config(tmp_path, hpo__trials=2, hpo__metric=metric, hpo__pruner__kind="none"))
    assert [t.state for t in study.trials()] == [TrialState.COMPLETE] * 2
    assert [t.value for t in study.trials()] == pytest.approx([0, 0.5])


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL (the system does that when memory runs out)"),
        ("import sys; sys.exit(3)", "exited with status 3"),
        ("import sys; sys.exit('error: the disk is full')", "the disk is full"),
    ],
)
def test_a_training_process_that_dies_is_a_failed_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, expected: str
) -> None:
    monkeypatch.setattr(trials, "COMMAND", [sys.executable, "-c", code])
    with (tmp_path / "lock").open("w") as lock, pytest.raises(UserError) as e:
        list(trials.epochs(make_config(tmp_path), tmp_path, lock, {}, RUNNING))
    assert expected in str(e.value)


# --- the study in its database


def test_a_running_trial_counts_as_killed_only_when_its_lock_is_free(tmp_path: Path) -> None:
    config = make_config(tmp_path, hpo__trials=3)
    ours, theirs = make_study(config), make_study(config)
    first, second = ours.claim(), theirs.claim()
    assert first
    assert second
    assert (first[0].number, second[0].number) == (0, 1)
    assert first[0].params != second[0].params
    assert theirs.fail_killed() == []
    first[1].close()  # as when its process dies
    assert theirs.fail_killed() == [0]
    assert [t.state for t in ours.trials()] == [TrialState.FAIL, TrialState.RUNNING]
    third = theirs.claim()
    assert third
    assert third[0].number == 2
    assert theirs.claim() is None  # three in all, the killed one counted


def test_a_trial_that_ends_while_killed_ones_are_looked_for_is_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, hpo__trials=3)
    ours, theirs = make_study(config), make_study(config)
    claim = ours.claim()
    assert claim
    asked = theirs.trials

    def ends_after_it_was_asked_for(*states: TrialState) -> list[FrozenTrial]:
        found = asked(*states)
        if states == (TrialState.RUNNING,):
            ours.optuna.tell(claim[0], 0.5)
            claim[1].close()
        return found

    monkeypatch.setattr(theirs, "trials", ends_after_it_was_asked_for)
    assert theirs.fail_killed() == []
    assert [t.state for t in asked()] == [TrialState.COMPLETE]


def test_a_study_refuses_settings_whose_trials_would_not_compare(tmp_path: Path) -> None:
    make_study(make_config(tmp_path))
    make_study(make_config(tmp_path, hpo__trials=99, data__threads=2, encoder__final_training_epochs=3))
    make_study(make_config(tmp_path, train__validate_every=7, train__closing_score=False))  # trials have their own
    for over, words in (
        ({"hpo__epochs": 5}, r"hpo\.epochs = 4, now it is 5"),
        ({"encoder__batch_size": 8}, r"encoder\.batch_size = 4"),
        ({"space": {"encoder.simsiam.learning_rate": {"low": 0.02, "high": 1.0, "log": True}}}, "low=0.01"),
    ):
        with pytest.raises(UserError, match=words):
            make_study(make_config(tmp_path, **over))
    assert make_study(make_config(tmp_path), "fedcba9876543210").name == "simsiam-fedcba98"  # other data, another study
    named = make_config(tmp_path, hpo__study_name="mine")
    make_study(named)
    with pytest.raises(UserError, match="shards = "):
        make_study(named, "fedcba9876543210")
    with pytest.raises(UserError, match="use no slashes"):
        make_study(make_config(tmp_path, hpo__study_name="a/b"))


def test_files_of_a_study_that_is_not_in_the_database_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_training(monkeypatch, lambda _: [0.5] * 4)
    study = search(make_config(tmp_path, hpo__trials=1))
    kept = study.trial_folder(0) / "metrics.jsonl"
    kept.write_text("kept")
    (tmp_path / "hpo.db").unlink()
    with pytest.raises(UserError, match=r"the database has no trial 0: move"):
        search(make_config(tmp_path, hpo__trials=1))
    assert kept.read_text() == "kept"


def test_a_study_without_a_finished_trial_is_closed(tmp_path: Path) -> None:
    study = make_study(make_config(tmp_path))
    parent = StudyRun(study)
    trials.close(study, parent, "KILLED")
    assert (study.folder / "trials.csv").read_text().strip() == "seconds,epochs,reason"
    study.optuna.ask()  # runs, in another process
    trials.close(study, parent, "KILLED")
    (row,) = csv.DictReader((study.folder / "trials.csv").open())
    assert (row["state"], row["seconds"]) == ("RUNNING", "")


def test_a_database_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Optuna cannot open sqlite:////nowhere/hpo\.db"):
        make_study(make_config(tmp_path, hpo__storage="sqlite:////nowhere/hpo.db"))
    with pytest.raises(UserError, match="Optuna cannot open nonsense"):
        make_study(make_config(tmp_path, hpo__storage="nonsense"))


# --- the command


def hpo_command(folder: Path, shards: Path, *options: str, **over: object) -> list[str]:
    """`python -m simsiam_dali.hpo` with tiny settings and trials of one epoch."""
    over = {"hpo__storage": f"sqlite:///{folder}/hpo.db", "hpo__epochs": 1, **over}
    args = command(folder, shards, *options, **over)
    return [args[0], "-m", "simsiam_dali.hpo", *args[3:]]


SPAWNED = """
import time
from simsiam_dali import hpo
from simsiam_dali.search import trials

def epochs(config, *_):
    time.sleep(0.02)
    for epoch in range(2):
        yield {"epoch": epoch, "knn/artist": config.encoder.simsiam.learning_rate}

trials.epochs = epochs
hpo.main()
"""


def test_processes_that_share_a_study_repeat_no_trial_and_stop_at_the_requested_number(
    tmp_path: Path, small_shards: Path
) -> None:
    """Real processes and a real database, and trials so quick that they meet all the time."""
    args = hpo_command(tmp_path, small_shards, "--trials", "12", "--no-final", mlflow__enabled="false")
    processes = [start([sys.executable, "-c", SPAWNED, *args[3:]], tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (folder,) = (tmp_path / "runs/hpo").glob("simsiam-*")
    study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{tmp_path}/hpo.db")
    assert [t.number for t in study.trials] == list(range(12))
    assert all(t.state.is_finished() for t in study.trials)
    assert len({tuple(t.params.items()) for t in study.trials}) == 12
    ran = [sum(line.startswith("trial ") for line in out.splitlines()) for out, _ in outputs]
    assert sum(ran) == 12
    assert min(ran) > 0


def wait_for(path: Path, process: fork_server.Process | subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


STANDING = f"""
import sys
from simsiam_dali import hpo
from simsiam_dali.search import trials
usual = trials.start_training
def start_training(options, *rest, **more):
    if "trial-0001" in options[1]:
        trials.COMMAND = (sys.executable, "-c", {PATIENT!r})
    return usual(options, *rest, **more)
trials.start_training = start_training
hpo.main()
"""
"""A search whose second trial lasts until it is stopped."""


def test_killed_it_continues_with_the_next_trial_and_trains_the_best_at_the_end(
    tmp_path: Path, small_shards: Path
) -> None:
    name = {"hpo__study_name": "mine", "encoder__final_training_epochs": 2}
    args = hpo_command(tmp_path, small_shards, "--trials", "3", **name)
    process = start([sys.executable, "-c", STANDING, *args[3:]], tmp_path)
    wait_for(tmp_path / "runs/hpo/mine/trial-0001/metrics.jsonl", process)
    process.kill()
    process.communicate()
    done = run(args, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "trial 1 of 3  failed: its process was killed" in done.stdout  # once its training process had gone too
    assert "trial 0 of 3" not in done.stdout

    study = optuna.load_study(study_name="mine", storage=f"sqlite:///{tmp_path}/hpo.db")
    assert [t.state for t in study.trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert len({tuple(t.params.items()) for t in study.trials}) == 3

    best = study.best_trial
    chosen = load_config(tmp_path / "runs/hpo/mine/best.yaml")
    assert chosen.encoder.simsiam.learning_rate == best.params["encoder.simsiam.learning_rate"]
    final = tmp_path / f"runs/hpo-mine-trial-{best.number:04d}"
    trained = load_config(final / "config.yaml")
    assert trained.encoder == chosen.encoder
    assert trained.encoder.epochs == 2
    assert (final / "checkpoint.pt").exists()
    assert not list(tmp_path.glob("runs/hpo/mine/trial-*/checkpoint.pt"))

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("music_recommendation")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if r.info.run_name == "hpo-mine"]
    assert parent.info.status == "FINISHED"
    files = {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert {"best.yaml", "trials.csv", "history.png"} <= files
    nested = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    by_number = {r.data.tags["hpo.trial"]: r for r in nested}
    assert len(nested) == len(by_number) == 3
    assert [by_number[n].info.status for n in "012"] == ["FINISHED", "KILLED", "FINISHED"]
    assert by_number["0"].data.metrics["knn/artist"] == pytest.approx(study.trials[0].value)
    assert by_number["0"].data.tags["encoder_type"] == "simsiam"
    (of_best,) = [r for r in runs if r.info.run_name == final.name]
    assert of_best.data.tags[BEST_OF_TAG] == "mine"

    again = run(args, tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"the best settings are already trained: runs/{final.name}" in again.stdout.replace(f"{tmp_path}/", "")


def test_a_signal_ends_the_trial_and_prints_how_to_continue(tmp_path: Path, small_shards: Path) -> None:
    args = hpo_command(tmp_path, small_shards, hpo__study_name="mine", hpo__epochs=1000, mlflow__enabled="false")
    process = start(args, tmp_path)
    wait_for(tmp_path / "runs/hpo/mine/trial-0000/metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err[-2000:]
    assert "stopped: the same command continues with trial 1: python -m simsiam_dali.hpo" in out
    (stopped,) = optuna.load_study(study_name="mine", storage=f"sqlite:///{tmp_path}/hpo.db").trials
    assert (stopped.state, stopped.user_attrs["reason"]) == (TrialState.FAIL, "interrupted")


@pytest.mark.parametrize("store", ["file", "server"])
def test_one_mlflow_run_is_the_parent_of_all_trials_of_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, store: str
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db" if store == "file" else request.getfixturevalue("mlflow_uri")
    client = mlflow.MlflowClient(uri)
    values = iter([0.5, 0.75, 0.625])
    fake_training(monkeypatch, lambda _: [next(values)] * 4)
    tracked: dict[str, Any] = {"mlflow__enabled": True, "mlflow__tracking_uri": uri, "hpo__study_name": "mine"}
    tracked["mlflow__experiment_name"] = "search"  # other tests look at all runs of the default one
    ids = set()
    for total in (1, 3):  # the second process continues
        config = make_config(tmp_path, hpo__trials=total, **tracked)
        study = make_study(config)
        parent = StudyRun(study)
        ids.add(parent.run_id)
        trials.search(study, parent, RUNNING)
        trials.close(study, parent, "FINISHED")
    (run_id,) = ids
    assert run_id
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "hpo/best")] == [
        (0, 0.5),
        (1, 0.75),
        (2, 0.75),
    ]
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["hpo.metric"] == "knn/artist"
    assert "encoder_type" not in found.data.tags  # a study is no run of an encoder, and is not compared with one
    files = {f.path for f in client.list_artifacts(run_id)}
    assert files == {"best.yaml", "trials.csv", "history.png", "importance.png"}

    config = make_config(tmp_path, hpo__trials=4, **tracked)
    study = make_study(config)
    claim = study.claim()
    assert claim
    left = client.create_run(found.info.experiment_id, tags=parent.trial_tags(3)).info.run_id
    claim[1].close()  # as when its process is killed
    trials.search(study, StudyRun(study), RUNNING)
    assert client.get_run(left).info.status == "KILLED"


def test_a_pruned_trial_is_a_killed_run_in_mlflow(tmp_path: Path, small_shards: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = make_config(
        tmp_path,
        data__shards=small_shards,
        mlflow__enabled=True,
        mlflow__tracking_uri=uri,
        train__seed=3,
        encoder__epochs=1000,
        train__run_name="trial-0005",
    )
    (tmp_path / "runs/trial-0005").mkdir(parents=True)
    with (tmp_path / "lock").open("w") as lock:
        tags = {"hpo.trial": "5"}
        records = trials.epochs(config, tmp_path / "runs/trial-0005", lock, tags, RUNNING)
        assert next(records)["epoch"] == 0
        records.close()  # as by the pruner
    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("music_recommendation").experiment_id])
    assert found.info.status == "KILLED"
    assert found.data.tags["hpo.trial"] == "5"
    assert "epoch 0/1000" in (tmp_path / "runs/trial-0005/log.txt").read_text()
    assert not (tmp_path / "runs/trial-0005/checkpoint.pt").exists()


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start this command several times, without torchrun"):
        hpo.configure(hpo.build_parser().parse_args([]))
