"""The study's MLflow run, parent of the trials' runs. The study keeps its id, so that several processes share it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from simsiam_dali.config.schema import Config, flat
from simsiam_dali.search.study import Study
from simsiam_dali.tracking.client import connect, experiment_id

PARENT_TAG = "mlflow.parentRunId"
"""The tag by which MLflow nests a run in another."""

STUDY_PARAMS = ("hpo.metric", "hpo.epochs", "hpo.mean_epochs", "hpo.space.")


class StudyRun:
    """Opens the study's run, or creates it. With `mlflow.enabled: false` there is none, and nothing is logged.

    Construct it with the study locked, or two processes would create one each.
    """

    run_id: str | None = None

    def __init__(self, config: Config, study: Study) -> None:
        self.study, self.uri = study, config.mlflow.tracking_uri
        if not config.mlflow.enabled:
            return
        with connect(self.uri) as client:
            self.experiment_id = experiment_id(client, config.mlflow.experiment_name)
            self.run_id = self._existing(client) or self._create(client, config)
            client.update_run(self.run_id, "RUNNING")

    def _existing(self, client: Any) -> str | None:
        """The id that the study keeps, if this MLflow has that run."""
        kept: str | None = self.study.optuna.user_attrs.get("mlflow_run")
        runs = client.search_runs([self.experiment_id], f"tags.`hpo.study` = '{self.study.name}'")
        return kept if kept in [run.info.run_id for run in runs] else None

    def _create(self, client: Any, config: Config) -> str:
        name = f"hpo-{self.study.name}"
        run = client.create_run(self.experiment_id, tags={"hpo.study": self.study.name}, run_name=name)
        run_id: str = run.info.run_id
        for key, value in flat(config).items():
            if key.startswith(STUDY_PARAMS):
                client.log_param(run_id, key, value)
        self.study.optuna.set_user_attr("mlflow_run", run_id)
        return run_id

    def trial_tags(self, number: int) -> dict[str, str]:
        """The tags that nest a trial's run in this one."""
        tags = {"hpo.study": self.study.name, "hpo.trial": str(number)}
        return tags | {PARENT_TAG: self.run_id} if self.run_id else tags

    def trial_ended(self, number: int) -> None:
        """Log a complete trial's value, and the best so far."""
        trial, best = self.study.trials()[number], self.study.best()
        if self.run_id and trial.state == TrialState.COMPLETE and best:
            with connect(self.uri) as client:
                client.log_metric(self.run_id, "hpo/value", trial.value, step=number)
                client.log_metric(self.run_id, "hpo/best", best.value, step=number)

    def trials_killed(self, numbers: Iterable[int]) -> None:
        """Close the runs of trials whose process was killed before it could."""
        for number in numbers if self.run_id else ():
            query = f"tags.`{PARENT_TAG}` = '{self.run_id}' and tags.`hpo.trial` = '{number}'"
            with connect(self.uri) as client:
                for run in client.search_runs([self.experiment_id], query):
                    if run.info.status == "RUNNING":
                        client.set_terminated(run.info.run_id, "KILLED")

    def end(self, status: str, files: Iterable[Path]) -> None:
        """Upload the files, and close the run unless another process still runs a trial."""
        if self.run_id:
            with connect(self.uri) as client:
                for path in files:
                    client.log_artifact(self.run_id, str(path))
                if not self.study.trials(TrialState.RUNNING):
                    client.set_terminated(self.run_id, status)
