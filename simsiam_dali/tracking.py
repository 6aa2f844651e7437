"""MLflow: parameters, tags, metrics and artifacts of a run. With `mlflow.enabled: false`, mlflow is never imported."""

import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from simsiam_dali.config import Config, fields
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.encoders import encoder_type
from simsiam_dali.errors import UserError

SERVER_TIMEOUT = 5.0
"""Seconds a tracking server has to answer before the first batch."""


def tags(config: Config) -> dict[str, str]:
    """The tags of the plan's section 9.1 that `mlflow.auto_tags` asks for and the encoder type has."""
    name, own = config.encoder.encoder_type, encoder_type(config).tags(config)
    everything = {"encoder_type": name, "experiment_variant": f"{name}_{own['loss_type']}", **own}
    return {tag: everything[tag] for tag in config.mlflow.auto_tags if tag in everything}


def flat(config: Config) -> dict[str, Any]:
    """Every setting under its dotted key, as MLflow parameters."""

    def value(key: str) -> Any:
        node: Any = config
        for part in key.split("."):
            node = getattr(node, part)
        return node

    return {key: value(key) for key, _ in fields()}


REASON_LENGTH = 500
"""Characters of an `end_reason`; MLflow refuses very long tags."""


class Tracker:
    """Does nothing: what a run without MLflow, or a rank other than 0, talks to."""

    run_id: str | None = None

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Log finite values at `step`."""

    def artifact(self, path: Path) -> None:
        """Keep a copy of a file with the run."""

    def end(self, status: str, reason: str = "") -> None:
        """Close the run: FINISHED, KILLED or FAILED. A reason becomes the tag `end_reason`."""


class MlflowTracker(Tracker):
    """One MLflow run; `run_id` continues an earlier one."""

    def __init__(
        self, config: Config, shards: ShardSet, run_name: str, run_id: str | None, more_tags: Mapping[str, str]
    ) -> None:
        with opening(config.mlflow.tracking_uri):
            import mlflow

            self.mlflow = mlflow
            mlflow.set_tracking_uri(config.mlflow.tracking_uri)
            mlflow.set_experiment(config.mlflow.experiment_name)
            run = mlflow.start_run(run_id=run_id, run_name=None if run_id else run_name)
        self.run_id = run.info.run_id
        if run_id is None:
            mlflow.log_params({key: value for key, value in flat(config).items() if not key.startswith("hpo.")})
        # runs on other songs are not to be compared
        mlflow.set_tags({**tags(config), "shards": shards.fingerprint, **more_tags})

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Log the values that are numbers; MLflow's databases refuse NaN."""
        self.mlflow.log_metrics({k: v for k, v in values.items() if v == v}, step=step)

    def artifact(self, path: Path) -> None:
        """Upload a file."""
        self.mlflow.log_artifact(str(path))

    def end(self, status: str, reason: str = "") -> None:
        """Close the run."""
        if reason:
            self.mlflow.set_tag("end_reason", reason[:REASON_LENGTH])
        self.mlflow.end_run(status)


def create_tracker(
    config: Config, shards: ShardSet, run_name: str, run_id: str | None, main: bool, more_tags: Mapping[str, str]
) -> Tracker:
    """The tracker of this process. Raises UserError when the server does not answer."""
    if not (config.mlflow.enabled and main):
        return Tracker()
    return MlflowTracker(config, shards, run_name, run_id, more_tags)


@contextmanager
def opening(uri: str) -> Iterator[None]:
    """Around MLflow's import and first calls: telemetry off, and a store that cannot be opened is a UserError."""
    # A music library is nobody else's business: MLflow's usage telemetry stays off unless asked for.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    check_server(uri)
    try:
        yield
    except Exception as e:  # MLflow raises SQLAlchemy's, requests' and its own errors here
        reason = " ".join(str(e).split())[:200]
        raise UserError(
            f"MLflow cannot open {uri} ({reason}); mend mlflow.tracking_uri, or train without it:"
            " --set mlflow.enabled=false"
        ) from e


def check_server(uri: str) -> None:
    """One quick request, since MLflow itself would retry for minutes."""
    if urlsplit(uri).scheme not in ("http", "https"):
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_TIMEOUT):
            return
    except (urllib.error.URLError, OSError, ValueError) as e:
        raise UserError(
            f"the MLflow server {uri} does not answer ({e}): start it (mlflow server), correct mlflow.tracking_uri or"
            " MLFLOW_TRACKING_URI, or train without it: --set mlflow.enabled=false"
        ) from e


def how_to_look(config: Config) -> Iterator[str]:
    """Lines that tell the user where the run can be seen."""
    if not config.mlflow.enabled:
        return
    uri = config.mlflow.tracking_uri
    if urlsplit(uri).scheme in ("http", "https"):
        yield f"MLflow     {uri}  (experiment {config.mlflow.experiment_name})"
    else:
        yield f"MLflow     mlflow ui --backend-store-uri {uri}"
        yield f'           then http://localhost:5000, experiment "{config.mlflow.experiment_name}"'


class EarlierRun:
    """A run that more is added to after its end; its status, parameters and tags stay as they are.

    `found` is false where the database or server at `uri` has no run `run_id`. Raises UserError when a server does not
    answer.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self.run_id, self.found = run_id, False
        check_server(uri)
        if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
            return  # MLflow would make an empty database
        from mlflow import MlflowClient

        try:
            self._client = MlflowClient(tracking_uri=uri)
            self._client.get_run(run_id)
            self.found = True
        except Exception as e:  # MLflow raises SQLAlchemy's, requests' and its own errors here
            if getattr(e, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                raise UserError(f"MLflow cannot open run {run_id} of {uri} ({' '.join(str(e).split())[:200]})") from e

    def metrics(self, values: dict[str, float]) -> None:
        """Add the values that are numbers."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(name, value, now, 0) for name, value in values.items() if value == value]
        for start in range(0, len(metrics), 1000):  # MLflow takes no more at once
            self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def artifact(self, path: Path, folder: str) -> None:
        """Upload a file into a folder of the run's artifacts."""
        self._client.log_artifact(self.run_id, str(path), folder)
