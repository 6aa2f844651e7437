"""The one place that connects to MLflow, a database file or a server, with one rule for retries.

A server gets SERVER_TIMEOUT seconds to answer a health request before each group of calls; MLflow retries a call once.
"""

import contextlib
import fcntl
import math
import os
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from simsiam_dali.common.errors import UserError, one_line
from simsiam_dali.config.schema import MlflowConfig

if TYPE_CHECKING:  # MLflow takes seconds to import, and a run without it never does
    from mlflow import MlflowClient
    from mlflow.entities import Run

SERVER_TIMEOUT = 5.0
"""Seconds."""

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a music library is private
    # MLflow's defaults, 7 retries of 120 s, would stop a training for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # a new database is no news
}
"""Set unless the user has set them."""

ADVICE = "correct mlflow.tracking_uri or MLFLOW_TRACKING_URI, or train without MLflow: --set mlflow.enabled=false"
ADVICE_TO_READ = "correct --tracking-uri, MLFLOW_TRACKING_URI or mlflow.tracking_uri"
ADVICE_TO_LOG = "correct --tracking-uri, or log nothing to MLflow: --no-mlflow"


@contextmanager
def connect(uri: str, advice: str = ADVICE) -> Iterator["MlflowClient"]:
    """Yield a client for a group of calls. advice: what the user can do when they fail.

    Raises UserError when the server does not answer, or for any error that MLflow raises inside the block.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    check_server(uri, advice)
    try:
        from mlflow import MlflowClient

        with _folder_locked(uri):
            client = MlflowClient(tracking_uri=uri)
        yield client
    except UserError:
        raise
    except Exception as e:  # MLflow raises SQLAlchemy's, requests' and its own errors here
        raise UserError(f"MLflow cannot use {uri} ({one_line(e)}): {advice}") from e


@contextmanager
def _folder_locked(uri: str) -> Iterator[None]:
    """Lock the folder of an SQLite file while a client makes its tables: two processes that make them both fail."""
    parts = urlsplit(uri)
    with contextlib.ExitStack() as stack:
        if parts.scheme == "sqlite":
            with contextlib.suppress(OSError):  # it is not there, or its file system has no such locks
                folder = os.open(Path(parts.path[1:]).parent, os.O_RDONLY)
                stack.callback(os.close, folder)
                fcntl.flock(folder, fcntl.LOCK_EX)
        yield


def check_server(uri: str, advice: str) -> None:
    """Raise UserError when `uri` is a server that does not answer a health request."""
    if not is_server(uri):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_TIMEOUT).close()
    except (OSError, ValueError) as e:
        raise UserError(f"the MLflow server {uri} does not answer ({e}): start it (mlflow server), or {advice}") from e


def is_server(uri: str) -> bool:
    """Whether `uri` names a server, and not a database file."""
    return urlsplit(uri).scheme in ("http", "https")


def missing_database(uri: str) -> Path | None:
    """The SQLite file, or the folder of the old file store, that `uri` names and MLflow would create empty."""
    parts = urlsplit(uri)
    if parts.scheme not in ("sqlite", "file", ""):
        return None
    path = Path(parts.path[1:] if parts.scheme == "sqlite" else parts.path)
    return None if path.exists() else path


def experiment_id(client: "MlflowClient", name: str) -> str:
    """Id of the experiment, which is created when it does not exist."""
    from mlflow.exceptions import MlflowException

    try:  # created before it is looked for, since another process may create it at any moment
        return str(client.create_experiment(name))
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return str(client.get_experiment_by_name(name).experiment_id)


def viewing_hints(config: MlflowConfig) -> Iterator[str]:
    """Lines for the terminal: how to view the experiment in the MLflow UI."""
    if config.enabled and is_server(config.tracking_uri):
        yield f"MLflow     {config.tracking_uri}  (experiment {config.experiment_name})"
    elif config.enabled:
        yield f"MLflow     mlflow ui --backend-store-uri {config.tracking_uri}"
        yield f'           then http://localhost:5000, experiment "{config.experiment_name}"'


def experiment_runs(uri: str, name: str) -> "list[Run]":
    """All runs of an experiment, newest first. Raises UserError where it does not exist."""
    if path := missing_database(uri):
        raise UserError(f"there is no MLflow database {path}: train first, or name another with --tracking-uri")
    with connect(uri, ADVICE_TO_READ) as client:
        experiment = client.get_experiment_by_name(name)
        if not experiment or experiment.lifecycle_stage == "deleted":
            known = ", ".join(sorted(e.name for e in client.search_experiments())) or "none"
            raise UserError(
                f"{uri} has no experiment {name!r}; it has {known}: choose one with --experiment, or train first"
            )
        page = client.search_runs([experiment.experiment_id])
        runs = list(page)
        while page.token:
            page = client.search_runs([experiment.experiment_id], page_token=page.token)
            runs += page
    return runs


def metric_history(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of every value that was logged."""
    with connect(uri, ADVICE_TO_READ) as client:
        return [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]


def has_run(uri: str, run_id: str) -> bool:
    """Whether the database or server has this run."""
    if missing_database(uri):
        return False
    with connect(uri, ADVICE_TO_LOG) as client:
        from mlflow.exceptions import MlflowException

        try:
            client.get_run(run_id)
        except MlflowException as e:
            if e.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
    return True


def add_to_run(uri: str, run_id: str, values: Mapping[str, float], files: Iterable[Path], folder: str) -> None:
    """Log the values that are not NaN, at step 0, and upload files into a folder of the run's artifacts.

    The run's status, parameters and tags stay as they are.
    """
    with connect(uri, ADVICE_TO_LOG) as client:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(name, value, now, 0) for name, value in values.items() if not math.isnan(value)]
        client.log_batch(run_id, metrics=metrics)
        for path in files:
            client.log_artifact(run_id, str(path), folder)
