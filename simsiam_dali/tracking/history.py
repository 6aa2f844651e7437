"""The runs of one MLflow experiment, from a database file or a server."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from simsiam_dali.common.errors import UserError
from simsiam_dali.evaluation.compare_runs import METRICS, Comparison, Run

# MLflow's databases keep infinity as the largest float.
LARGEST = 1e300


def check_store(uri: str) -> None:
    """Raise UserError for a server that does not answer, or a file that is not there (MLflow would make a new one)."""
    from simsiam_dali.tracking import run as tracking  # may bring torch, which --help has no use for

    parts = urlsplit(uri)
    try:
        tracking.check_server(uri)
    except UserError as e:
        raise UserError(
            f"the MLflow server {uri} does not answer ({e.__cause__}): start it (mlflow server), or correct"
            " --tracking-uri, MLFLOW_TRACKING_URI or mlflow.tracking_uri"
        ) from e
    if parts.scheme in ("sqlite", "file", ""):
        path = Path(parts.path[1:] if parts.scheme == "sqlite" else parts.path)
        if not path.exists():
            raise UserError(f"there is no MLflow database {path}: train first, or name another with --tracking-uri")


@contextmanager
def one_line(uri: str) -> Iterator[None]:
    """Turn what goes wrong inside MLflow into a UserError."""
    try:
        yield
    except Exception as e:  # MLflow raises SQLAlchemy's, requests' and its own errors here
        raise UserError(f"MLflow cannot read {uri}: {' '.join(str(e).split())[:200]}") from e


class Store:
    """The runs of one experiment, read from an MLflow database or server."""

    def __init__(self, uri: str, experiment: str) -> None:
        check_store(uri)
        self.uri = uri
        # A music library is nobody else's business: MLflow's usage telemetry stays off unless asked for.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        with one_line(uri):
            self.client = MlflowClient(tracking_uri=uri)
            known = {e.name: e.experiment_id for e in pages(self.client.search_experiments)}
        if experiment not in known:
            raise UserError(
                f"{uri} has no experiment {experiment!r}, it knows {', '.join(sorted(known)) or 'none'}:"
                " choose one with --experiment, or train first"
            )
        self.experiment_id: str = known[experiment]

    def runs(self) -> list[Run]:
        """Every run tagged `encoder_type`, newest first."""
        with one_line(self.uri):
            found = pages(self.client.search_runs, experiment_ids=[self.experiment_id])
        runs = [_run(run) for run in found if "encoder_type" in run.data.tags]
        return sorted(runs, key=lambda run: run.started, reverse=True)

    def with_untrained(self, comparison: Comparison) -> Comparison:
        """The same with each chosen run's kNN scores before training, which training logs at step 0."""
        types = {
            t: [replace(run, untrained=self._untrained(run)) for run in runs] for t, runs in comparison.types.items()
        }
        return replace(comparison, types=types)

    def _untrained(self, run: Run) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in (m.name for m in METRICS if m.name.startswith("knn/") and m.name in run.values):
            with one_line(self.uri):
                history = self.client.get_metric_history(run.id, name)
            before = [point.value for point in history if point.step == 0]
            if before and len(before) < len(history):
                found[name] = _finite(before[0])
        return found


def pages(search: Any, **arguments: Any) -> list[Any]:
    """All results of an MLflow search, which gives them page by page."""
    page = search(**arguments)
    found = list(page)
    while page.token:
        page = search(**arguments, page_token=page.token)
        found += page
    return found


def _finite(value: float) -> float:
    return value if abs(value) < LARGEST else math.nan


def _run(run: Any) -> Run:
    tags = run.data.tags
    return Run(
        id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        encoder_type=tags["encoder_type"],
        status=run.info.status,
        started=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        trial="mlflow.parentRunId" in tags,
        shards=tags.get("shards"),
        seed=run.data.params.get("train.seed", ""),
        values={name: _finite(value) for name, value in run.data.metrics.items()},
    )
