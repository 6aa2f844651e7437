"""The MLflow run of a training: parameters, tags, metrics and artifacts. With `mlflow.enabled: false` it does nothing.

An unreachable MLflow never ends a training: metrics and files are buffered in the process and sent later. What a killed
process had buffered is in the run's journal, from which `backfill` sends it. (MLflow's own asynchronous logging drops
what its retries cannot send.)
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from simsiam_dali.common.errors import UserError, one_line
from simsiam_dali.config.schema import Config, flat
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.tracking.client import connect, experiment_id

MAX_METRICS = 1000
"""MLflow accepts no more in one request."""

MAX_REASON_LENGTH = 500
"""Characters of the tag `end_reason`; MLflow refuses very long tags."""


def run_tags(config: Config) -> dict[str, str]:
    """The tags that `mlflow.auto_tags` names, where the encoder type has them."""
    name, own = config.encoder.encoder_type, encoder_type(config).tags
    everything = {"encoder_type": name, "experiment_variant": f"{name}_{own['loss_type']}", **own}
    return {tag: everything[tag] for tag in config.mlflow.auto_tags if tag in everything}


class Tracker:
    """Logs nothing: for a training without MLflow, and for ranks other than 0. It keeps an earlier run's id.

    complete: whether MLflow has everything that was logged.
    """

    complete = True

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id

    def backfill(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Log the metrics of the journal's epochs that MLflow lacks. Raises UserError where MLflow is unreachable."""

    def log_epoch(self, record: Mapping[str, Any]) -> None:
        """Log the finite numbers of an epoch's record."""

    def log_artifact(self, path: Path) -> None:
        """Upload a copy of a file."""

    def end(self, status: str, reason: str = "") -> None:
        """Close the run: FINISHED, KILLED or FAILED. A reason becomes the tag `end_reason`."""


class MlflowTracker(Tracker):
    """One MLflow run; `run_id` continues an earlier one. Raises UserError where MLflow is unreachable at the start."""

    def __init__(self, config: Config, shards: ShardSet, run_name: str, run_id: str | None) -> None:
        self.uri = config.mlflow.tracking_uri
        # Runs on different songs do not compare: the tag shards tells them apart.
        tags = {**run_tags(config), "shards": shards.fingerprint}
        with connect(self.uri) as client:
            from mlflow.entities import Param
            from mlflow.tracking.context.registry import resolve_tags

            # mlflow.start_run would wait for an unreachable server once more when the process ends.
            if run_id:
                client.update_run(run_id, "RUNNING")
                for key, value in tags.items():
                    client.set_tag(run_id, key, value)
            else:
                experiment = experiment_id(client, config.mlflow.experiment_name)
                run_id = client.create_run(experiment, tags=resolve_tags(tags), run_name=run_name).info.run_id
                settings = {k: v for k, v in flat(config).items() if not k.startswith("hpo.")}
                client.log_batch(run_id, params=[Param(k, str(v)) for k, v in settings.items()])
        super().__init__(run_id)
        self._metrics: list[Any] = []  # mlflow.entities.Metric, not sent yet
        self._files: list[Path] = []

    def backfill(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Log the metrics of the journal's epochs that MLflow lacks."""
        names = {name for record in records for name in loggable(record)}
        with connect(self.uri) as client:
            known = {name: {metric.step for metric in client.get_metric_history(self.run_id, name)} for name in names}
        for record in records:
            self._buffer({k: v for k, v in loggable(record).items() if record["step"] not in known[k]}, record["step"])
        self._send()

    def log_epoch(self, record: Mapping[str, Any]) -> None:
        """Log the finite numbers of an epoch's record."""
        self._buffer(loggable(record), record["step"])
        self._send()

    def log_artifact(self, path: Path) -> None:
        """Upload a copy of a file."""
        self._files.append(path)
        self._send()

    def end(self, status: str, reason: str = "") -> None:
        """Close the run."""
        self._send(status, reason)

    def _buffer(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        self._metrics += [Metric(name, value, now, step) for name, value in values.items()]

    def _send(self, status: str = "", reason: str = "") -> None:
        """Send the buffer, oldest first, then how the run ended. What cannot be sent now stays in the buffer."""
        try:
            with connect(self.uri) as client:
                while self._metrics:
                    client.log_batch(self.run_id, metrics=self._metrics[:MAX_METRICS])
                    del self._metrics[:MAX_METRICS]
                while self._files:
                    client.log_artifact(self.run_id, str(self._files[0]))
                    del self._files[0]
                if reason:
                    client.set_tag(self.run_id, "end_reason", reason[:MAX_REASON_LENGTH])
                if status:
                    client.set_terminated(self.run_id, status)
        except UserError as e:
            if self.complete:
                tqdm.write(
                    f"warning: MLflow at {self.uri} is unreachable ({one_line(e.__cause__ or e)}); training continues,"
                    " metrics are buffered and sent later"
                )
            self.complete = False
            return
        if not self.complete:
            tqdm.write(f"MLflow at {self.uri} is reachable again and complete")
        self.complete = True


def loggable(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an epoch's record that are finite: MLflow's databases refuse NaN."""
    named = {k: v for k, v in record.items() if "/" in k or k == "training_time_hours"}
    return {k: v for k, v in named.items() if v is not None and math.isfinite(v)}


def create_tracker(config: Config, shards: ShardSet, run_name: str, run_id: str | None, main: bool) -> Tracker:
    """The tracker of this process. Raises UserError when the server does not answer."""
    if not (config.mlflow.enabled and main):
        return Tracker(run_id)
    return MlflowTracker(config, shards, run_name, run_id)
