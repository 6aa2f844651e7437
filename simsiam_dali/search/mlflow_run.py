"""The MLflow run above the trials' runs. It outlives the processes that work on the study, which keeps its id."""

from collections.abc import Iterable
from pathlib import Path

from optuna.trial import TrialState

from simsiam_dali.config.schema import Config
from simsiam_dali.search.study import Study
from simsiam_dali.tracking.run import flat, opening

PARENT = "mlflow.parentRunId"
"""The tag by which MLflow knows a run as nested in another."""

OWN_PARAMETERS = ("hpo.metric", "hpo.epochs", "hpo.mean_epochs", "hpo.space.")


class StudyRun:
    """Opens the study's run, or makes it. With `mlflow.enabled: false` there is none, and nothing happens.

    Open it under the study's lock, or two processes would make one each.
    """

    run_id: str | None = None

    def __init__(self, config: Config, study: Study) -> None:
        self.study, self.uri, self.experiment = study, config.mlflow.tracking_uri, config.mlflow.experiment_name
        if not config.mlflow.enabled:
            return
        with opening(self.uri):
            from mlflow import MlflowClient

            self.client = MlflowClient(self.uri)
            found = self.client.get_experiment_by_name(self.experiment)
            experiment_id = found.experiment_id if found else self.client.create_experiment(self.experiment)
            self.experiment_id = experiment_id
            self.run_id = self._known() or self._create(config)
            self.client.update_run(self.run_id, "RUNNING")

    def _known(self) -> str | None:
        """The id that the study keeps, if it is a run of this MLflow."""
        kept = self.study.optuna.user_attrs.get("mlflow_run")
        runs = self.client.search_runs([self.experiment_id], f"tags.`hpo.study` = '{self.study.name}'")
        return kept if kept in [run.info.run_id for run in runs] else None

    def _create(self, config: Config) -> str:
        name = f"hpo-{self.study.name}"
        run = self.client.create_run(self.experiment_id, tags={"hpo.study": self.study.name}, run_name=name)
        run_id: str = run.info.run_id
        for key, value in flat(config).items():
            if key.startswith(OWN_PARAMETERS):
                self.client.log_param(run_id, key, value)
        self.study.optuna.set_user_attr("mlflow_run", run_id)
        return run_id

    def trial_tags(self, number: int) -> dict[str, str]:
        """The tags that nest a trial's run in this one."""
        own = {"hpo.study": self.study.name, "hpo.trial": str(number)}
        return own | {PARENT: self.run_id} if self.run_id else own

    def trial_ended(self, number: int) -> None:
        """Log a complete trial's value, and the best so far."""
        trial, best = self.study.trials()[number], self.study.best()
        if self.run_id and trial.state == TrialState.COMPLETE and best:
            self.client.log_metric(self.run_id, "hpo/value", trial.value, step=number)
            self.client.log_metric(self.run_id, "hpo/best", best.value, step=number)

    def trials_killed(self, numbers: Iterable[int]) -> None:
        """Close the runs of trials whose process could not do it."""
        for number in numbers if self.run_id else ():
            wanted = f"tags.`{PARENT}` = '{self.run_id}' and tags.`hpo.trial` = '{number}'"
            for run in self.client.search_runs([self.experiment_id], wanted):
                if run.info.status == "RUNNING":
                    self.client.set_terminated(run.info.run_id, "KILLED")

    def end(self, status: str, files: Iterable[Path]) -> None:
        """Keep copies of the files, and close the run unless another process still works on a trial."""
        if self.run_id:
            for path in files:
                self.client.log_artifact(self.run_id, str(path))
            if not self.study.trials(TrialState.RUNNING):
                self.client.set_terminated(self.run_id, status)
