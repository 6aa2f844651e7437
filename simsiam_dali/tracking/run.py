"""MLflow: parameters, tags, metrics and artifacts of a run. With `mlflow.enabled: false`, mlflow is never imported."""

import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.schema import Config, flat
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.models.registry import encoder_type

SERVER_TIMEOUT = 5.0
"""Seconds a tracking server has to answer before the first batch, and after each epoch."""

MOST_METRICS = 1000
"""MLflow takes no more at once."""


def tags(config: Config) -> dict[str, str]:
    """The tags of the plan's section 9.1 that `mlflow.auto_tags` asks for and the encoder type has."""
    name, own = config.encoder.encoder_type, encoder_type(config).tags
    everything = {"encoder_type": name, "experiment_variant": f"{name}_{own['loss_type']}", **own}
    return {tag: everything[tag] for tag in config.mlflow.auto_tags if tag in everything}


REASON_LENGTH = 500
"""Characters of an `end_reason`; MLflow refuses very long tags."""


class Tracker:
    """Does nothing: what a run without MLflow, or a rank other than 0, talks to. It passes on an earlier run's id.

    complete: whether MLflow has all that it was given.
    """

    complete = True

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id

    def catch_up(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Log what the run's journal holds of its epochs and MLflow does not, since its server was gone."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Log an epoch's record."""

    def artifact(self, path: Path) -> None:
        """Keep a copy of a file with the run."""

    def end(self, status: str, reason: str = "") -> None:
        """Close the run: FINISHED, KILLED or FAILED. A reason becomes the tag `end_reason`."""


class MlflowTracker(Tracker):
    """One MLflow run; `run_id` continues an earlier one.

    Once it is open, nothing that becomes of the server or the database ends the training. What MLflow does not take is
    kept here and sent after the next epoch; what a killed process kept, or one that ended, is in the run's journal, and
    `catch_up` sends it. (MLflow's own asynchronous logging drops what its retries cannot send.)
    """

    def __init__(
        self, config: Config, shards: ShardSet, run_name: str, run_id: str | None, more_tags: Mapping[str, str]
    ) -> None:
        self.uri = config.mlflow.tracking_uri
        # runs on other songs are not to be compared
        run_tags = {**tags(config), "shards": shards.fingerprint, **more_tags}
        with opening(self.uri):
            import mlflow
            from mlflow.tracking.context.registry import resolve_tags

            # A client, not mlflow.start_run, which would wait for a lost server once more when the process ends.
            mlflow.set_tracking_uri(self.uri)
            experiment = mlflow.set_experiment(config.mlflow.experiment_name)
            self.client = mlflow.MlflowClient(self.uri)
            if run_id:
                self.client.update_run(run_id, "RUNNING")
                for key, value in run_tags.items():
                    self.client.set_tag(run_id, key, value)
            else:
                everything = resolve_tags(run_tags)
                run_id = self.client.create_run(
                    experiment.experiment_id, tags=everything, run_name=run_name
                ).info.run_id
                mlflow.log_params({k: v for k, v in flat(config).items() if not k.startswith("hpo.")}, run_id=run_id)
        super().__init__(run_id)
        self._metrics: list[Any] = []  # mlflow.entities.Metric, not sent yet
        self._files: list[Path] = []

    def catch_up(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Log what the run's journal holds of its epochs and MLflow does not."""
        known: dict[str, set[int]] = {}
        with opening(self.uri):
            for record in records:
                for name in logged(record):
                    if name not in known:
                        known[name] = {metric.step for metric in self.client.get_metric_history(self.run_id, name)}
        for record in records:
            self._keep({k: v for k, v in logged(record).items() if record["step"] not in known[k]}, record["step"])
        self._send()

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Log the values that are numbers."""
        self._keep(logged(record), record["step"])
        self._send()

    def artifact(self, path: Path) -> None:
        """Upload a file."""
        self._files.append(path)
        self._send()

    def end(self, status: str, reason: str = "") -> None:
        """Close the run."""
        self._send(status, reason)

    def _keep(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        self._metrics += [Metric(name, value, now, step) for name, value in values.items()]

    def _send(self, status: str = "", reason: str = "") -> None:
        """Send what is kept, oldest first, and how the run ended; what MLflow does not take now stays kept."""
        try:
            check_server(self.uri)
            while self._metrics:
                self.client.log_batch(self.run_id, metrics=self._metrics[:MOST_METRICS])
                del self._metrics[:MOST_METRICS]
            while self._files:
                self.client.log_artifact(self.run_id, str(self._files[0]))
                del self._files[0]
            if reason:
                self.client.set_tag(self.run_id, "end_reason", reason[:REASON_LENGTH])
            if status:
                self.client.set_terminated(self.run_id, status)
        except Exception as e:  # MLflow raises SQLAlchemy's, requests' and its own errors here
            if self.complete:
                why = " ".join(str(e.__cause__ or e).split())[:200]
                tqdm.write(
                    f"warning: MLflow at {self.uri} takes nothing ({why}); training goes on, and what it lacks is kept"
                    " and sent when it answers"
                )
            self.complete = False
            return
        if not self.complete:
            tqdm.write(f"MLflow at {self.uri} answers again and has everything")
        self.complete = True


def logged(record: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow gets of an epoch's record: the numbers that are finite, since MLflow's databases refuse NaN."""
    named = {k: v for k, v in record.items() if "/" in k or k == "training_time_hours"}
    return {k: v for k, v in named.items() if v is not None and math.isfinite(v)}


def create_tracker(
    config: Config, shards: ShardSet, run_name: str, run_id: str | None, main: bool, more_tags: Mapping[str, str]
) -> Tracker:
    """The tracker of this process. Raises UserError when the server does not answer."""
    if not (config.mlflow.enabled and main):
        return Tracker(run_id)
    return MlflowTracker(config, shards, run_name, run_id, more_tags)


@contextmanager
def opening(uri: str) -> Iterator[None]:
    """Around MLflow's import and first calls: telemetry off, and a store that cannot be opened is a UserError."""
    # A music library is nobody else's business: MLflow's usage telemetry stays off unless asked for.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow's own would try for minutes, while the training waits: 7 times, 120 s each.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
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
        for start in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + MOST_METRICS])

    def artifact(self, path: Path, folder: str) -> None:
        """Upload a file into a folder of the run's artifacts."""
        self._client.log_artifact(self.run_id, str(path), folder)
