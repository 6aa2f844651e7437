"""The A/B comparison on runs whose numbers are known: what it selects, prints, writes and refuses."""

import csv
import socket
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from helpers import fork_server
from helpers.logged_runs import log_run
from mlflow import MlflowClient

from simsiam_dali import compare
from simsiam_dali.evaluation.compare_runs import BEST_OF_TAG, EVALUATE, METRICS, Metric

SCORES = {"knn/artist": 0.5, "knn/artist_chance": 0.1, "encoder/train_loss": -0.9, "training_time_hours": 0.25}


class Home:
    """A folder with an MLflow database of its own, where a user would type the command."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.capsys, self.monkeypatch = folder, capsys, monkeypatch
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.experiment = "music_recommendation"

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def log(self, encoder_type: str | None, values: dict[str, float], **more: object) -> str:
        return log_run(self.client, self.experiment, encoder_type, values, **more)  # type: ignore[arg-type]

    def type(self, *args: object, uri: str | None = None) -> str:
        """Run the command; returns what it printed."""
        where = ["--tracking-uri", uri or self.uri, "--experiment", self.experiment]
        self.monkeypatch.setattr(sys, "argv", ["compare", *where, *map(str, args)])
        compare.main()
        return self.capsys.readouterr().out

    def refused(self, *args: object, uri: str | None = None) -> str:
        """Run the command, which must end with one line on stderr; returns that line."""
        with pytest.raises(SystemExit) as e:
            self.type(*args, uri=uri)
        assert e.value.code == 1
        printed = self.capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert printed.err.startswith("error: ")
        return printed.err

    def rows(self, name: str = "runs/compare.csv") -> list[dict[str, str]]:
        with (self.folder / name).open() as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes a second to make its tables: once is enough."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def home(
    tmp_path: Path, empty_database: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Home:
    for variable in ("MLFLOW_TRACKING_URI", "ENCODER_TYPE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    return Home(tmp_path, capsys, monkeypatch)


def line(text: str, start: str) -> str:
    """The one line of `text` that begins with `start`."""
    (found,) = [row for row in text.splitlines() if row.startswith(start)]
    return found


# --- which runs


def test_the_best_of_each_type_by_artist_until_there_is_a_rating_error(home: Home) -> None:
    home.log("simsiam", SCORES | {"knn/artist": 0.4})
    best = home.log("simsiam", SCORES | {"knn/artist": 0.6, "knn/rating_mae": 0.3})
    other = home.log("simple", SCORES | {"knn/artist": 0.3})
    printed = home.type()
    assert {row["run_id"] for row in home.rows()} == {best, other}
    assert "best by knn/artist, higher is better, since no run has classifier/val_mse yet" in printed
    assert line(printed, "knn/artist").split() == ["knn/artist", "0.6", "0.3", "higher", "simsiam"]
    assert line(printed, "runs").split() == ["runs", "1", "of", "2", "1", "of", "1"]

    rated = home.log("simsiam", {"classifier/val_mse": 0.02, "knn/artist": 0.1})
    worse = home.log("simsiam", {"classifier/val_mse": 0.03, "knn/artist": 0.9})
    printed = home.type()
    assert {row["run_id"] for row in home.rows()} == {rated, other}
    assert "best by classifier/val_mse, lower is better" in printed
    assert "simple: 0 of 1 run with classifier/val_mse; its newest are shown" in printed
    assert "simsiam: 2 of 4 runs with classifier/val_mse; the others cannot be the best" in printed
    assert "the best of more runs is better by chance alone" in printed
    home.type("--by", "knn/artist")
    assert {row["run_id"] for row in home.rows()} == {worse, other}


@pytest.mark.parametrize("metric", [m for m in METRICS if m.comparable], ids=lambda m: m.name)
def test_each_metric_has_the_right_direction(home: Home, metric: Metric) -> None:
    lower_is_better = {
        "classifier/val_mse", "classifier/val_mae", "knn/rating_mae", "training_time_hours",
    }  # fmt: skip
    low, high = home.log("simsiam", {metric.name: 0.25}), home.log("simsiam", {metric.name: 0.75})
    home.log("simple", {metric.name: 0.5})
    printed = home.type("--by", metric.name)
    best = low if metric.name in lower_is_better else high
    assert [row["run_id"] for row in home.rows() if row["encoder_type"] == "simsiam"] == [best]
    assert line(printed, metric.name).split()[-1] == "simsiam"
    assert line(printed, metric.name).split()[-2] == ("lower" if best == low else "higher")


def test_unfinished_failed_nested_and_foreign_runs_are_left_out(home: Home) -> None:
    home.log("simple", SCORES)
    good = home.log("simsiam", SCORES | {"knn/artist": 0.2})
    home.log("simsiam", SCORES | {"knn/artist": 0.9}, status="FAILED")
    home.log("simsiam", SCORES | {"knn/artist": 0.9}, status="RUNNING")
    home.log("simsiam", {"somebody/elses": 0.9})
    home.log(None, SCORES | {"knn/artist": 0.9})
    trial = home.log("simsiam", SCORES | {"knn/artist": 0.8}, **{"mlflow.parentRunId": good})
    printed = home.type()
    assert home.rows()[0]["run_id"] == good
    assert "excluded: 2 runs not finished" in printed
    assert "excluded: 1 run nested in another, such as hpo's trials (include them with --include-trials)" in printed
    assert "excluded: 1 run without the tag encoder_type (mlflow.auto_tags)" in printed
    assert "excluded: 1 run without any metric of this table" in printed
    home.type("--include-trials")
    assert home.rows()[0]["run_id"] == trial


def test_only_runs_on_the_same_shards(home: Home) -> None:
    old, new = "a" * 64, "b" * 64
    for start, (encoder_type, shards) in enumerate([("simsiam", old), ("simple", old), ("simple", new)]):
        home.log(encoder_type, SCORES | {"knn/artist": 0.9 - start / 10}, shards=shards, start=start)
    newest = home.log("simsiam", SCORES, shards=new, start=9)
    printed = home.type()
    assert {row["shards"] for row in home.rows()} == {new}
    assert home.rows()[0]["run_id"] == newest
    assert f"excluded: runs on other shards than {new[:12]}: 1 simple, 1 simsiam" in printed
    assert f"(compare them with --shard-set {old[:12]})" in printed
    home.type("--shard-set", old[:12])
    assert {row["shards"] for row in home.rows()} == {old}
    refused = home.refused("--shard-set", "ccc")
    assert f"no run is on shards ccc; there are runs on {new[:12]}, {old[:12]}" in refused

    home.log("simple", SCORES | {"knn/artist": 1.0})
    printed = home.type()
    assert "1 run without the tag shards: possibly on other songs" in printed
    assert [row["shards"] for row in home.rows()] == [new, ""]


def test_every_page_of_a_large_experiment_is_read(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        home.log("simsiam", SCORES)
    home.log("simple", SCORES)
    whole = MlflowClient.search_runs
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *a, **k: whole(*a, **k | {"max_results": 2}))
    assert line(home.type("--runs", 0), "runs").split() == ["runs", "3", "of", "3", "1", "of", "1"]


# --- what is printed


def test_the_last_value_the_untrained_one_and_the_guess(home: Home) -> None:
    untrained = {"knn/artist": 0.25, "knn/artist_chance": 0.1}
    home.log("simsiam", SCORES, untrained=untrained, params={"train.seed": 7})
    home.log("simple", {"training_time_hours": 1}, untrained=untrained | {"knn/artist": 0.3})  # scored only once
    printed = home.type()
    assert line(printed, "knn/artist").split() == ["knn/artist", "0.5", "0.3", "higher", "simsiam"]
    assert line(printed, "  chance").split() == ["chance", "0.1", "0.1"]
    assert line(printed, "  untrained").split() == ["untrained", "0.25", "-"]
    simsiam, simple = home.rows()
    assert simsiam["knn/artist"] == "0.5"
    assert simsiam["knn/artist_untrained"] == "0.25"
    assert simsiam["knn/artist_chance"] == "0.1"
    assert simsiam["classifier/val_mse"] == ""
    assert simsiam["seed"] == "7"
    assert simsiam["started"] == "2023-11-14T22:13:20+00:00"
    assert simple["knn/artist_untrained"] == ""


def test_predicted_ratings_stand_above_a_guess_s_and_the_untrained_encoder_s(home: Home) -> None:
    rating = {
        "classifier/val_mse": 0.04, "classifier/val_mse_chance": 0.06, "classifier/val_mse_untrained": 0.03,
        "classifier/val_mse_songs": 29, "classifier/val_mae": 0.1, "classifier/val_mae_songs": 29,
    }  # fmt: skip
    home.log("simsiam", rating)
    home.log("simple", rating | {"classifier/val_mse": 0.05})
    home.log("joint", {"knn/artist": 0.5, "knn/artist_songs": 12})
    lines = [row.split() for row in home.type().splitlines()]
    at = lines.index(["classifier/val_mse", "0.04", "0.05", "-", "lower", "simsiam"])
    assert lines[at + 1 : at + 5] == [
        ["chance", "0.06", "0.06", "-"],
        ["untrained", "0.03", "0.03", "-"],
        ["songs", "scored", "29", "29", "-"],
        ["classifier/val_mae", "0.1", "0.1", "-", "lower"],
    ]
    assert lines[at + 5 : at + 7] == [["knn/artist", "-", "-", "0.5", "higher"], ["songs", "scored", "-", "-", "12"]]
    assert home.rows()[0]["classifier/val_mse_untrained"] == "0.03"


def test_runs_of_a_type_that_differ_in_more_than_the_seed_are_named(home: Home) -> None:
    for seed, rate in ((1, 0.1), (2, 0.1), (3, 0.2)):
        batch = {"train.micro_batch": "auto" if seed < 3 else 32}  # whose batch norm differs
        settings = {"train.seed": seed, "encoder.simsiam.learning_rate": rate, "data.threads": seed} | batch
        home.log("simsiam", SCORES, params=settings, **({} if seed < 3 else {BEST_OF_TAG: "mine"}))
        home.log("simple", SCORES, params={"train.seed": seed})
    printed = home.type("--runs", 0)
    (differ,) = [row for row in printed.splitlines() if " differ in " in row]
    assert differ == (
        "the 3 runs of type simsiam differ in encoder.simsiam.learning_rate, train.micro_batch: their range is not that"
        " of seeds alone"
    )
    assert "settings chosen by hpo on these validation songs, which favours " in printed
    assert "differ in" not in home.type()


def test_settings_that_a_type_does_not_read_are_not_named(home: Home) -> None:
    differing = (
        "encoder.simple.learning_rate", "encoder.joint.tag_weight", "encoder.contrastive.temperature",
        "encoder.simsiam.n_mels", "encoder.embedding_dim", "encoder.final_training_epochs", "data.short_views",
        "encoder.epochs",
    )  # fmt: skip
    views = "data.short_views", "encoder.epochs", "encoder.simsiam.n_mels"
    expected = {
        "simsiam": views,
        "simple": ("encoder.embedding_dim", "encoder.epochs", "encoder.simple.learning_rate"),
        "joint": (*views, "encoder.contrastive.temperature", "encoder.joint.tag_weight"),
    }
    for value in (1, 2):
        for encoder_type in (*expected, "unknown"):
            home.log(encoder_type, SCORES, params=dict.fromkeys(differing, value))
    printed = home.type("--runs", 0)
    for encoder_type, own in expected.items():
        named = line(printed, f"the 2 runs of type {encoder_type} differ in ")
        assert named.partition(" differ in ")[2].partition(": ")[0] == ", ".join(sorted(own))
    assert "and 3 more" in line(printed, "the 2 runs of type unknown differ in ")


def test_missing_metrics_are_listed_with_the_command_that_logs_them(home: Home) -> None:
    home.log("simsiam", {m.name: 0.5 for m in METRICS}, **{"mlflow.runName": "whole"})
    home.log("simple", {"knn/artist": 0.5, "training_time_hours": 1}, **{"mlflow.runName": "poor"})
    missing = [row for row in home.type().splitlines() if row.startswith("missing: ")]
    assert missing[0] == (
        "missing: classifier/val_mse, classifier/val_mae, classifier/val_correlation in poor"
        " (logged by python -m simsiam_dali.evaluate, with rated songs; of an encoder that learned from tags, with 20"
        " rated songs held back from its training: raise pack's --val-fraction)"
    )
    named = {name for row in missing for name in row.removeprefix("missing: ").partition(" in ")[0].split(", ")}
    assert named == {m.name for m in METRICS} - {"knn/artist", "training_time_hours"}
    assert not any("whole" in row for row in missing)


def test_losses_are_shown_and_not_compared(home: Home) -> None:
    home.log("simsiam", SCORES)
    home.log("simple", SCORES | {"encoder/train_loss": 2.5})
    row = line(home.type(), "encoder/train_loss")
    assert row.split()[1:3] == ["-0.9", "2.5"]
    assert row.endswith("not comparable between types")


def test_values_that_are_not_finite_are_reported_and_never_the_best(home: Home) -> None:
    for value in (float("nan"), float("inf")):
        home.log("simsiam", {"knn/artist": value}, **{"mlflow.runName": f"broken-{value}"})
    good = home.log("simsiam", {"knn/artist": 0.1})
    home.log("simple", {"knn/artist": 0.2, "knn/genre": float("nan")}, **{"mlflow.runName": "half"})
    printed = home.type()
    assert home.rows()[0]["run_id"] == good
    assert "not finite: knn/genre in half" in printed
    assert home.rows()[1]["knn/genre"] == ""
    printed = home.type("--runs", 0)
    assert "  0.1, n=1  " in line(printed, "knn/artist")
    assert "not finite: knn/artist in broken-inf" in printed


def test_one_run_each_is_no_result_and_several_seeds_have_mean_range_and_number(home: Home) -> None:
    for value in (0.5, 0.6, 0.7):
        home.log("simsiam", {"knn/artist": value, "knn/genre": value, "knn/rating_mae": value})
    home.log("simple", {"knn/artist": 0.4, "knn/genre": 0.4, "knn/rating_mae": 0.2})
    assert "one run each: the difference may be chance" in home.type()
    printed = home.type("--runs", 0)
    assert "one run of simple: the difference may be chance" in printed
    assert "0.6 (0.5 to 0.7)" in line(printed, "knn/artist")
    assert "ranges" not in line(printed, "knn/artist")

    home.log("simple", {"knn/artist": 0.2, "knn/genre": 0.65, "knn/rating_mae": 0.55, "classifier/val_mae": 0.5})
    printed = home.type("--runs", 0)
    assert "may be chance" not in printed
    assert line(printed, "runs").split() == ["runs", "3", "of", "3", "2", "of", "2"]
    assert "0.3 (0.2 to 0.4)" in line(printed, "knn/artist  ")
    assert line(printed, "knn/artist  ").endswith("simsiam, ranges disjoint")
    assert line(printed, "knn/genre").endswith("simsiam, ranges overlap")
    assert line(printed, "knn/rating_mae").endswith("simple, ranges overlap")
    # Of the 10 ways to pick which 2 of 5 runs are simple's, 2 have disjoint ranges.
    assert "the ranges of 3 and 2 runs are disjoint, which has probability 20.0% for two equal types" in printed
    assert "the ranges overlap, so these runs do not show" in home.type("--runs", 0, "--by", "knn/genre")
    assert "probability" not in home.type("--runs", 2)
    assert len(home.rows()) == 4
    home.log("simple", {"knn/rating_mae": 0.1, "knn/genre": 0.2})
    assert "ranges overlap" in line(home.type("--runs", 0), "knn/rating_mae")
    assert line(home.type("--runs", 2, "--by", "knn/rating_mae"), "knn/rating_mae").endswith("simple, ranges disjoint")


def test_no_type_is_ahead_of_an_equal_one(home: Home) -> None:
    home.log("simsiam", {"knn/artist": 0.5})
    home.log("simple", {"knn/artist": 0.5})
    assert line(home.type(), "knn/artist").split()[-1] == "higher"


def test_runs_without_any_score_are_the_newest(home: Home) -> None:
    home.log("simsiam", {"encoder/train_loss": -0.99}, start=1)
    newest = home.log("simsiam", {"encoder/train_loss": -0.5}, start=2)
    home.log("simple", {"encoder/train_loss": 3.0})
    assert "newest runs: none has classifier/val_mse or knn/artist to select the best by" in home.type()
    assert home.rows()[0]["run_id"] == newest


def test_the_filters_find_in_mlflow_what_the_table_shows(home: Home) -> None:
    def found(text: str) -> list[str]:
        experiment_id = home.client.get_experiment_by_name(home.experiment).experiment_id
        return sorted(run.info.run_id for run in home.client.search_runs([experiment_id], text))

    def shown(*args: object) -> dict[str, list[str]]:
        """What the printed filters find, and no other than the rows of the table."""
        printed = home.type(*args)
        first, *others = printed[printed.index("\nfilter     ") :].strip().removeprefix("filter").split("\n       or  ")
        rows = {row["run_id"]: row["encoder_type"] for row in home.rows()}
        assert found(first) == sorted(rows)
        types = list(dict.fromkeys(rows.values()))
        assert [found(text) for text in others] == [sorted(i for i, t in rows.items() if t == own) for own in types]
        assert f"mlflow ui --backend-store-uri {home.uri}" in printed
        return dict(zip(types, map(found, others), strict=True))

    new = {"shards": "b" * 64}
    ids = [home.log("simsiam", SCORES, **new), home.log("simple", SCORES, **new)]
    home.log("simple", SCORES, shards="a" * 64)
    home.log("simsiam", SCORES, status="FAILED", **new)
    study = home.log(None, {"hpo/best": 0.9})
    trial = home.log("simsiam", SCORES | {"knn/artist": 0.1}, **new, **{"mlflow.parentRunId": study})
    worse = home.log("simple", SCORES | {"knn/artist": 0.1}, start=1, **new)
    assert shown() == {"simsiam": [ids[0]], "simple": [ids[1]]}
    assert shown("--runs", 0) == {"simsiam": [ids[0]], "simple": sorted([ids[1], worse])}
    assert shown("--runs", 0, "--include-trials")["simsiam"] == sorted([ids[0], trial])


def test_of_one_type_alone_there_is_one_filter(home: Home) -> None:
    home.log("simsiam", SCORES)
    printed = home.type()
    assert "attributes.run_id IN" in line(printed, "filter")
    assert "       or  " not in printed


def test_one_type_alone_names_the_command_for_the_other(home: Home) -> None:
    home.log("simsiam", SCORES)
    printed = home.type()
    assert "no simple run to compare with simsiam: python -m simsiam_dali.train --encoder-type simple" in printed
    assert "may be chance" not in printed
    assert len(home.rows()) == 1


# --- files


def test_the_plot_has_a_panel_for_each_metric(home: Home) -> None:
    home.log("simsiam", {m.name: 0.5 for m in METRICS} | {"knn/artist_chance": 0.1}, untrained={"knn/artist": 0.2})
    home.log("simple", {"encoder/train_loss": 2.0, "knn/artist": 0.4})
    home.type("--runs", 0)
    picture = matplotlib.image.imread(home.folder / "runs/compare.png")
    assert picture.shape[0] > 600  # three rows of panels
    assert picture.shape[1] > 1200
    for colour in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)):  # a bar of each type
        near = abs(picture[..., :3] * 255 - colour).max(axis=-1) < 2
        assert near.sum() > 1000
    assert sorted(p.name for p in (home.folder / "runs").iterdir()) == ["compare.csv", "compare.png"]


def test_files_of_this_command_are_replaced_and_others_are_not(home: Home) -> None:
    home.log("simsiam", SCORES)
    home.log("simple", SCORES)
    home.type("--csv", "mine.csv", "--png", "deep/er/mine.png")
    home.log("simple", SCORES | {"knn/artist": 0.9})
    home.type("--csv", "mine.csv", "--png", "deep/er/mine.png")
    assert home.rows("mine.csv")[1]["knn/artist"] == "0.9"

    for option in ("--csv", "--png"):
        theirs = home.folder / f"ratings{option}"
        theirs.write_text("song,rating\n")
        assert f"{theirs} exists and is not a comparison" in home.refused(option, theirs)
        assert theirs.read_text() == "song,rating\n"
    assert "choose another file" in home.refused("--csv", home.folder)
    assert "choose two files" in home.refused("--csv", "same", "--png", "same")
    (home.folder / "file").write_text("")
    with pytest.raises(SystemExit):  # known only when it is written, after the table
        home.type("--csv", "file/x.csv")
    assert "error: cannot write file/x.csv" in home.capsys.readouterr().err


def test_the_settings_name_the_experiment_and_the_folder(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.experiment = "other"
    home.log("simsiam", SCORES)
    home.log("simple", SCORES)
    (home.folder / "my.yaml").write_text(
        f"mlflow: {{tracking_uri: '{home.uri}', experiment_name: other, enabled: false}}"
    )
    monkeypatch.setattr(sys, "argv", ["compare", "--config", "my.yaml", "--set", "train.runs_dir=out"])
    compare.main()
    assert 'experiment "other"' in home.capsys.readouterr().out
    assert len(home.rows("out/compare.csv")) == 2


# --- refusals


def test_a_loss_cannot_choose(home: Home) -> None:
    for name in ("encoder/val_loss", "encoder/train_loss", "train_loss", "knn/beauty"):
        refused = home.refused("--by", name)
        assert f"--by {name} is refused; use one of classifier/val_mse, " in refused
        assert "(a loss cannot show" in refused
    home.log("simsiam", SCORES)
    assert f"no run has classifier/val_mae yet (logged by {EVALUATE})" in home.refused("--by", "classifier/val_mae")


def test_no_experiment_and_no_runs(home: Home) -> None:
    assert "no experiment 'music_recommendation'; it has Default" in home.refused()
    home.log(None, SCORES)
    refused = home.refused()
    assert "no finished run tagged encoder_type; excluded: 1 run without the tag encoder_type" in refused
    assert "train first" in refused
    home.log("simsiam", SCORES, status="KILLED")
    assert "excluded: 1 run not finished" in home.refused()
    assert not (home.folder / "runs").exists()


def test_a_missing_database_is_not_created(home: Home) -> None:
    assert "there is no MLflow database nowhere.db: train first" in home.refused(uri="sqlite:///nowhere.db")
    assert not (home.folder / "nowhere.db").exists()
    (home.folder / "text.db").write_text("no database")
    assert "MLflow cannot use sqlite:///text.db (" in home.refused(uri="sqlite:///text.db")


def test_a_server_that_does_not_answer(home: Home) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{s.getsockname()[1]}"  # bound, but nobody listens
        assert f"the MLflow server {uri} does not answer" in home.refused(uri=uri)


def test_a_number_of_runs_is_whole(home: Home) -> None:
    with pytest.raises(SystemExit) as e:
        home.type("--runs", "-1")
    assert e.value.code == 2
    assert "not a whole number" in home.capsys.readouterr().err


# --- from outside


def test_the_command_against_a_server(home: Home, mlflow_uri: str) -> None:
    """As typed, with nothing but MLFLOW_TRACKING_URI to say where."""
    client = MlflowClient(mlflow_uri)
    best = log_run(client, "music_recommendation", "simsiam", SCORES | {"knn/artist": 0.8}, {"knn/artist": 0.3})
    log_run(client, "music_recommendation", "simsiam", SCORES)
    log_run(client, "music_recommendation", "simple", SCORES)
    words = [sys.executable, "-m", "simsiam_dali.compare"]
    done = fork_server.run(words, home.folder, {"MLFLOW_TRACKING_URI": mlflow_uri})
    assert done.returncode == 0, done.stderr
    assert line(done.stdout, "knn/artist").split() == ["knn/artist", "0.8", "0.5", "higher", "simsiam"]
    assert line(done.stdout, "  untrained").split() == ["untrained", "0.3", "-"]
    assert mlflow_uri in line(done.stdout, "MLflow")
    assert home.rows()[0]["run_id"] == best
    assert done.stderr == ""


def test_help_needs_neither_mlflow_nor_torch() -> None:
    code = "import sys, simsiam_dali.compare as c; c.build_parser().format_help(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "simsiam_dali.evaluation.compare_runs" in loaded
    assert not {"mlflow", "torch", "matplotlib", "pandas"} & set(loaded)
