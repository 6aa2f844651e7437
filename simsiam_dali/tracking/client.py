"""The one place that connects to MLflow, a database file or a server, with one rule for retries.

A server gets SERVER_TIMEOUT seconds to answer a health request before each group of calls; MLflow retries a call once.
"""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from simsiam_dali.common.errors import UserError, one_line
from simsiam_dali.config.schema import MlflowConfig

if TYPE_CHECKING:  # MLflow takes seconds to import, and a run without it never does
    from mlflow import MlflowClient

SERVER_TIMEOUT = 5.0
"""Seconds."""

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a music library is private
    # MLflow's defaults, 7 retries of 120 s, would stop a training for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
"""Set unless the user has set them."""

ADVICE = "correct mlflow.tracking_uri or MLFLOW_TRACKING_URI, or train without MLflow: --set mlflow.enabled=false"


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

        yield MlflowClient(tracking_uri=uri)
    except UserError:
        raise
    except Exception as e:  # MLflow raises SQLAlchemy's, requests' and its own errors here
        raise UserError(f"MLflow cannot use {uri} ({one_line(e)}): {advice}") from e


def check_server(uri: str, advice: str) -> None:
    """Raise UserError when `uri` is a server that does not answer a health request."""
    if not is_server(uri):
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_TIMEOUT):
            return
    except (urllib.error.URLError, OSError, ValueError) as e:
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
