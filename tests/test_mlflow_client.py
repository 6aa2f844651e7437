"""The MLflow client: an unreachable server costs seconds, in every command that uses one."""

import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import fork_server

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.data.shards import open_shards
from simsiam_dali.tracking import client
from simsiam_dali.tracking.client import add_to_run, connect, experiment_id, experiment_runs, has_run, metric_history
from simsiam_dali.tracking.run import Tracker


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The URI of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "call",
    [
        lambda uri: experiment_runs(uri, "any"),  # compare
        lambda uri: metric_history(uri, "any", "loss"),
        lambda uri: has_run(uri, "any"),  # evaluate, before its work
        lambda uri: add_to_run(uri, "any", {"a": 1.0}, [Path(__file__)], "evaluation"),  # and after it
    ],
    ids=["compare reads runs", "compare reads a metric", "evaluate finds the run", "evaluate logs to it"],
)
def test_a_server_that_never_answers_costs_seconds(
    silent_server: str, monkeypatch: pytest.MonkeyPatch, call: Callable[[str], object]
) -> None:
    assert client.SERVER_TIMEOUT <= 10
    monkeypatch.setattr(client, "SERVER_TIMEOUT", 0.5)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"the MLflow server {silent_server} does not answer") as e:
        call(silent_server)
    assert time.monotonic() - began < 3
    assert "--tracking-uri" in str(e.value)
    assert "\n" not in str(e.value)


def test_mlflow_retries_a_call_once(silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that stops between the health request and the call."""
    monkeypatch.setattr(client, "check_server", lambda *_: None)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    began = time.monotonic()
    with pytest.raises(UserError, match=f"MLflow cannot use {silent_server}"), connect(silent_server) as mlflow:
        mlflow.get_run("any")
    assert 2 <= time.monotonic() - began < 10  # two requests of 1 s, and the pause between them


def test_a_file_that_cannot_be_stored_leaves_no_run_open(
    tmp_path: Path, small_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as by a server whose bucket refuses it."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with connect(uri) as mlflow:
        mlflow.create_experiment("no bucket", artifact_location="/proc/nowhere")
    sets = ["encoder.encoder_type=simple", f"mlflow.tracking_uri={uri}", "mlflow.experiment_name=no bucket"]
    tracker = Tracker(load_config(assignments=sets), open_shards(small_shards), "a", None, True)
    tracker.log_artifact(Path(__file__))
    tracker.log_epoch({"step": 1, "epoch": 1, "encoder/train_loss": 0.5})
    tracker.end("FINISHED")
    assert not tracker.complete
    assert capsys.readouterr().out.count("did not store test_mlflow_client.py") == 1
    with connect(uri) as mlflow:
        run = mlflow.get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"encoder/train_loss": 0.5})


def test_an_experiment_is_created_once(tmp_path: Path) -> None:
    with connect(f"sqlite:///{tmp_path}/mlflow.db") as mlflow:
        first = experiment_id(mlflow, "mine")
        assert experiment_id(mlflow, "mine") == first
        assert mlflow.get_experiment(first).name == "mine"


MEETING = """
import sys, time
from mlflow.store.db import utils
from simsiam_dali.tracking.client import connect, experiment_id
look = utils._all_tables_exist
def slow_look(engine):
    found = look(engine)
    time.sleep(1.0)  # both have looked before either has made a table
    return found
utils._all_tables_exist = slow_look
with connect(sys.argv[1]) as client:
    print(experiment_id(client, "any"))
"""


def test_two_processes_make_one_database(tmp_path: Path) -> None:
    """Two trainings that are started together, where there is none."""
    args = [sys.executable, "-c", MEETING, f"sqlite:///{tmp_path}/mlflow.db"]
    both = [fork_server.start(args, tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [out for out, _ in said] == ["1\n", "1\n"]
