"""Report a study: lines for the terminal, best.yaml, trials.csv, plots, and its MLflow run."""

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import optuna.visualization.matplotlib as plots
from matplotlib import pyplot
from optuna.trial import FrozenTrial, TrialState

from simsiam_dali.common.files import atomic_write
from simsiam_dali.config.schema import flat
from simsiam_dali.search.study import Study
from simsiam_dali.tracking.client import connect, experiment_id

matplotlib.use("Agg")

BEST, TABLE, HISTORY, IMPORTANCE = "best.yaml", "trials.csv", "history.png", "importance.png"
KILLED = "its process was killed"

PARENT_TAG = "mlflow.parentRunId"
"""The tag by which MLflow nests a run in another."""

STUDY_PARAMS = ("hpo.metric", "hpo.epochs", "hpo.mean_epochs", "hpo.space.")


def params_text(trial: FrozenTrial, study: Study) -> str:
    """A trial's sampled settings, by the last part of their keys."""

    def show(value: object) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(show, value))}]"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    values = {key: study.space.dimensions[key].value(sampled) for key, sampled in trial.params.items()}
    return "  ".join(f"{key.rpartition('.')[2]} {show(value)}" for key, value in values.items())


def trial_line(study: Study, number: int) -> str:
    """One line: how a trial ended, and the best trial so far."""
    trial, best = study.trials()[number], study.best()
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    reason = trial.user_attrs.get("reason", KILLED)
    results = {
        TrialState.COMPLETE: f"{study.hpo.metric} {trial.value or 0.0:.3f}",
        TrialState.PRUNED: f"pruned {reason}",
        TrialState.FAIL: f"failed: {reason}",
    }
    so_far = f"best {best.value:.3f} (trial {best.number})" if best else "none complete yet"
    result, params = results[trial.state], params_text(trial, study)
    return f"trial {number} of {study.hpo.trials}  {result}  {so_far}  {seconds:.0f} s  {params}"


def closing_lines(study: Study, files: list[Path]) -> Iterator[str]:
    """How many trials ended how, the best one, and where the study's files are."""
    trials, best = study.trials(), study.best()
    names = {TrialState.FAIL: "failed or killed"}
    states = Counter(names.get(trial.state, trial.state.name.lower()) for trial in trials)
    counts = ", ".join(f"{count} {name}" for name, count in states.items())
    yield f"study      {study.name}: {len(trials)} of {study.hpo.trials} trials ({counts})"
    if best:
        ties = sum(trial.value == best.value for trial in study.trials(TrialState.COMPLETE))
        value = f"{study.hpo.metric} {best.value:.3f}" + (f" (the first of {ties} equal trials)" if ties > 1 else "")
        yield f"best       trial {best.number}: {value}; {params_text(best, study)}"
        yield f"settings   {study.folder / BEST}"
    yield f"trials     {', '.join(str(path) for path in files if path.name != BEST)}"


def write_tables(study: Study) -> list[Path]:
    """Write trials.csv and, once a trial is complete, best.yaml, a config file for the final training."""
    table, best = study.folder / TABLE, study.folder / BEST
    frame = study.optuna.trials_dataframe(attrs=("number", "state", "value", "datetime_start", "params"))
    trials = study.trials()
    frame["seconds"] = [t.duration.total_seconds() if t.duration else math.nan for t in trials]  # NaN while it runs
    frame["epochs"] = [t.last_step or 0 for t in trials]
    frame["reason"] = [t.user_attrs.get("reason", KILLED if t.state == TrialState.FAIL else "") for t in trials]
    with atomic_write(table) as part:
        frame.to_csv(part, index=False)
    if not (trial := study.best()):
        return [table]
    settings = study.space.config(trial.params, encoder__epochs=study.final_epochs)
    with atomic_write(best) as part:
        part.write_text(
            f"# The best of {len(trials)} trials of {study.name} so far: trial {trial.number},"
            f" {study.hpo.metric} {trial.value:.4f}.\n"
            "# That value is optimistic: all trials were scored on the same validation songs, which the best suits by"
            " chance too.\n"
            f"# python -m simsiam_dali.train --config {best}\n"
            f"{settings.to_yaml()}"
        )
    return [best, table]


def write_plots(study: Study) -> Iterator[Path]:
    """Write Optuna's plots of the study, those for which it has enough complete trials; yield their paths."""
    values = {trial.value for trial in study.trials(TrialState.COMPLETE)}
    wanted: list[tuple[str, Any]] = []
    if values:
        wanted.append((HISTORY, plots.plot_optimization_history))
    if len(values) > 1:  # importance needs a difference to explain
        wanted.append((IMPORTANCE, plots.plot_param_importances))
    for name, plot in wanted:
        path = study.folder / name
        with warnings.catch_warnings(), atomic_write(path) as part:
            warnings.simplefilter("ignore")  # that the plots are experimental, and that trials are few
            plot(study.optuna)
            figure = pyplot.gcf()
            figure.set_size_inches(9, 5)
            figure.savefig(part, format="png", dpi=110, bbox_inches="tight")
        pyplot.close(figure)
        yield path


class StudyRun:
    """The study's MLflow run, parent of the trials' runs, opened or created; none with `mlflow.enabled: false`.

    The study keeps its id, so that several processes share it. Construct it with the study locked, or two processes
    would create one each.
    """

    def __init__(self, study: Study) -> None:
        mlflow = study.config.mlflow
        self.study, self.uri = study, mlflow.tracking_uri
        self.tags = {"hpo.study": study.name}
        self.run_id: str | None = None
        if not mlflow.enabled:
            return
        with connect(self.uri) as client:
            self.experiment_id = experiment_id(client, mlflow.experiment_name)
            runs = client.search_runs([self.experiment_id], f"tags.`hpo.study` = '{study.name}'")
            self.run_id = study.optuna.user_attrs.get("mlflow_run")
            if self.run_id not in [run.info.run_id for run in runs]:  # a new study, or another MLflow
                run = client.create_run(self.experiment_id, tags=self.tags, run_name=f"hpo-{study.name}")
                self.run_id = run.info.run_id
                for key, value in flat(study.config).items():
                    if key.startswith(STUDY_PARAMS):
                        client.log_param(self.run_id, key, value)
                study.optuna.set_user_attr("mlflow_run", self.run_id)
            client.update_run(self.run_id, "RUNNING")

    def trial_tags(self, number: int) -> dict[str, str]:
        """The tags that nest a trial's run in this one."""
        parent = {PARENT_TAG: self.run_id} if self.run_id else {}
        return {**self.tags, "hpo.trial": str(number), **parent}

    def trial_ended(self, number: int) -> None:
        """Log a complete trial's value and the best so far; close the run of a training that was killed."""
        if not self.run_id:
            return
        trial, best = self.study.trials()[number], self.study.best()
        with connect(self.uri) as client:
            if trial.state == TrialState.COMPLETE and best:
                client.log_metric(self.run_id, "hpo/value", trial.value, step=number)
                client.log_metric(self.run_id, "hpo/best", best.value, step=number)
            query = f"tags.`{PARENT_TAG}` = '{self.run_id}' and tags.`hpo.trial` = '{number}'"
            for run in client.search_runs([self.experiment_id], f"{query} and attributes.status = 'RUNNING'"):
                client.set_terminated(run.info.run_id, "KILLED")

    def end(self, status: str, files: list[Path]) -> None:
        """Upload the files, and close the run unless another process still runs a trial."""
        if not self.run_id:
            return
        with connect(self.uri) as client:
            for path in files:
                client.log_artifact(self.run_id, str(path))
            if not self.study.trials(TrialState.RUNNING):
                client.set_terminated(self.run_id, status)
