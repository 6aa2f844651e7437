"""A finished MLflow run that later figures and files are added to; its status, parameters and tags stay as they are."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from simsiam_dali.tracking.client import connect, database_file

ADVICE = "correct --tracking-uri, or log nothing to MLflow: --no-mlflow"


class FinishedRun:
    """Run `run_id` of the database or server at `uri`. Every call raises UserError where MLflow is unreachable."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id

    @classmethod
    def find(cls, uri: str, run_id: str) -> Self | None:
        """The run, or None where the database or server has no such run."""
        path = database_file(uri)
        if path and not path.exists():
            return None  # MLflow would create an empty database
        with connect(uri, ADVICE) as client:
            from mlflow.exceptions import MlflowException

            try:
                client.get_run(run_id)
            except MlflowException as e:
                if e.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise
        return cls(uri, run_id)

    def log_metrics(self, values: Mapping[str, float]) -> None:
        """Add the values that are not NaN, at step 0."""
        with connect(self.uri, ADVICE) as client:
            from mlflow.entities import Metric

            now = time.time_ns() // 1_000_000
            metrics = [Metric(name, value, now, 0) for name, value in values.items() if not math.isnan(value)]
            client.log_batch(self.run_id, metrics=metrics)

    def log_artifact(self, path: Path, folder: str) -> None:
        """Upload a file into a folder of the run's artifacts."""
        with connect(self.uri, ADVICE) as client:
            client.log_artifact(self.run_id, str(path), folder)
