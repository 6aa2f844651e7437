"""Finished runs: those of an experiment, and figures and files that are added to one of them.

Every function raises UserError where MLflow is unreachable.
"""

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from simsiam_dali.common.errors import UserError
from simsiam_dali.tracking.client import connect, missing_database

if TYPE_CHECKING:
    from mlflow.entities import Run

ADVICE = "correct --tracking-uri, MLFLOW_TRACKING_URI or mlflow.tracking_uri"
"""To the user of a command that reads runs."""
LOGGING_ADVICE = "correct --tracking-uri, or log nothing to MLflow: --no-mlflow"
"""To the user of a command that adds to a run."""


def experiment_runs(uri: str, name: str) -> "list[Run]":
    """All runs of an experiment, newest first. Raises UserError where it does not exist."""
    if path := missing_database(uri):
        raise UserError(f"there is no MLflow database {path}: train first, or name another with --tracking-uri")
    with connect(uri, ADVICE) as client:
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
    with connect(uri, ADVICE) as client:
        return [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]


def has_run(uri: str, run_id: str) -> bool:
    """Whether the database or server has this run."""
    if missing_database(uri):
        return False
    with connect(uri, LOGGING_ADVICE) as client:
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
    with connect(uri, LOGGING_ADVICE) as client:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(name, value, now, 0) for name, value in values.items() if not math.isnan(value)]
        client.log_batch(run_id, metrics=metrics)
        for path in files:
            client.log_artifact(run_id, str(path), folder)
