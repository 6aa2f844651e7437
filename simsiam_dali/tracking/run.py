"""The MLflow run of a training: parameters, tags, metrics and artifacts.

An unreachable MLflow never ends a training: metrics and files are buffered in the process and sent later. What a killed
process had buffered is in the run's journal, from which `backfill` sends it. (MLflow's own asynchronous logging drops
what its retries cannot send.)
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simsiam_dali.common.errors import UserError, one_line
from simsiam_dali.common.terminal import print_line
from simsiam_dali.config.schema import Config, flat
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.tracking.client import connect, experiment_id

MAX_METRICS = 1000
"""MLflow accepts no more in one request."""

Value = tuple[str, float, int]
"""A metric's name, value and step."""

MAX_REASON_LENGTH = 500
"""Characters of the tag `end_reason`; MLflow refuses very long tags."""


class Tracker:
    """The MLflow run of a training; on ranks other than 0, or with `mlflow.enabled: false`, it logs nothing.

    run_id: of an earlier run that is continued. complete: whether MLflow has everything that was logged. Raises
    UserError where MLflow is unreachable at the start.
    """

    def __init__(self, config: Config, shards: ShardSet, run_name: str, run_id: str | None, main: bool) -> None:
        self.run_id, self.complete = run_id, True
        self._uri, self._active = config.mlflow.tracking_uri, config.mlflow.enabled and main
        self._metrics: list[tuple[str, float, int, int]] = []  # not sent yet: name, value, time (ms), step
        self._files: list[Path] = []
        if not self._active:
            return
        name, of_type = config.encoder.encoder_type, encoder_type(config).tags
        known = {"encoder_type": name, "experiment_variant": f"{name}_{of_type['loss_type']}", **of_type}
        # Runs on different songs do not compare: the tag shards tells them apart.
        tags: dict[str, str] = {"shards": shards.fingerprint}
        tags |= {tag: known[tag] for tag in config.mlflow.auto_tags if tag in known}
        with connect(self._uri) as client:
            from mlflow.entities import Param
            from mlflow.tracking.context.registry import resolve_tags

            # mlflow.start_run would wait for an unreachable server once more when the process ends.
            if run_id:
                client.update_run(run_id, "RUNNING")
                for key, value in tags.items():
                    client.set_tag(run_id, key, value)
            else:
                experiment = experiment_id(client, config.mlflow.experiment_name)
                run = client.create_run(experiment, tags=resolve_tags(tags), run_name=run_name)
                self.run_id = run.info.run_id
                settings = {k: v for k, v in flat(config).items() if not k.startswith("hpo.")}
                client.log_batch(self.run_id, params=[Param(k, str(v)) for k, v in settings.items()])

    def backfill(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Log the metrics of the journal's epochs that MLflow lacks. Raises UserError where MLflow is unreachable."""
        if not self._active:
            return
        metrics = [(name, value, r["step"]) for r in records for name, value in loggable(r).items()]
        with connect(self._uri) as client:
            names = {name for name, _, _ in metrics}
            known = {name: {metric.step for metric in client.get_metric_history(self.run_id, name)} for name in names}
        self._send([(name, value, step) for name, value, step in metrics if step not in known[name]])

    def log_epoch(self, record: Mapping[str, Any]) -> None:
        """Log the finite numbers of an epoch's record."""
        self._send([(name, value, record["step"]) for name, value in loggable(record).items()])

    def log_artifact(self, path: Path) -> None:
        """Upload a copy of a file."""
        self._send(files=[path])

    def end(self, status: str, reason: str = "") -> None:
        """Close the run: FINISHED, KILLED or FAILED. A reason becomes the tag `end_reason`."""
        self._send(end=status, reason=reason)

    def _send(self, values: Iterable[Value] = (), files: Iterable[Path] = (), end: str = "", reason: str = "") -> None:
        """Send the buffer, these at its end, and how the run ended; values and files stay there until they are sent."""
        if not self._active:
            return
        now = time.time_ns() // 1_000_000
        self._metrics += [(name, value, now, step) for name, value, step in values]
        self._files += files
        try:
            with connect(self._uri) as client:
                from mlflow.entities import Metric

                while self._metrics:
                    client.log_batch(self.run_id, metrics=[Metric(*metric) for metric in self._metrics[:MAX_METRICS]])
                    del self._metrics[:MAX_METRICS]
                if reason:
                    client.set_tag(self.run_id, "end_reason", reason[:MAX_REASON_LENGTH])
                if end:
                    client.set_terminated(self.run_id, end)
                while self._files:  # last: where they cannot be stored, all else still is
                    client.log_artifact(self.run_id, str(self._files[0]))
                    del self._files[0]
        except UserError as e:
            if self.complete:
                stored = not self._metrics and self._files
                failed = f"did not store {self._files[0].name}" if stored else "is unreachable"
                print_line(
                    f"warning: MLflow at {self._uri} {failed} ({one_line(e.__cause__ or e)}); training continues,"
                    " metrics and files are buffered and sent later"
                )
            self.complete = False
            return
        if not self.complete:
            print_line(f"MLflow at {self._uri} is reachable again and complete")
        self.complete = True


def loggable(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an epoch's record that are finite: MLflow's databases refuse NaN."""
    metrics = {k: v for k, v in record.items() if v is not None and ("/" in k or k == "training_time_hours")}
    return {k: v for k, v in metrics.items() if math.isfinite(v)}
