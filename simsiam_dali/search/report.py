"""Report a study: lines for the terminal, best.yaml, trials.csv and plots."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import optuna
import optuna.visualization.matplotlib as plots
from matplotlib import pyplot
from optuna.trial import FrozenTrial, TrialState

from simsiam_dali.common.files import atomic_write
from simsiam_dali.search.space import Space
from simsiam_dali.search.study import Study

matplotlib.use("Agg")

BEST, TABLE, HISTORY, IMPORTANCE = "best.yaml", "trials.csv", "history.png", "importance.png"
KILLED = "its process was killed"


def params_text(trial: FrozenTrial, space: Space) -> str:
    """A trial's sampled settings, by the last part of their keys."""

    def show(value: object) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(show, value))}]"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return "  ".join(f"{k.rpartition('.')[2]} {show(space.dimensions[k].value(v))}" for k, v in trial.params.items())


def trial_line(study: Study, number: int) -> str:
    """One line: how a trial ended, and the best trial so far."""
    trial, best = study.trials()[number], study.best()
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    reason = trial.user_attrs.get("reason", KILLED)
    results = {
        TrialState.COMPLETE: f"{study.metric} {trial.value or 0.0:.3f}",
        TrialState.PRUNED: f"pruned {reason}",
        TrialState.FAIL: f"failed: {reason}",
    }
    so_far = f"best {best.value:.3f} (trial {best.number})" if best else "none complete yet"
    params = params_text(trial, study.space)
    return f"trial {number} of {study.total}  {results[trial.state]}  {so_far}  {seconds:.0f} s  {params}"


def count_line(study: Study) -> str:
    """The number of trials in each state."""
    states = [trial.state for trial in study.trials()]
    names = {
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "pruned",
        TrialState.FAIL: "failed or killed",
        TrialState.RUNNING: "running",
    }
    counts = ", ".join(f"{states.count(state)} {name}" for state, name in names.items() if state in states)
    return f"study      {study.name}: {len(states)} of {study.total} trials ({counts})"


def write_best(study: Study, path: Path) -> None:
    """Write the best trial's settings as a config file for the final training, once a trial is complete."""
    if not (best := study.best()):
        return
    epochs = study.space.base["encoder"]["final_training_epochs"]
    content = (
        f"# The best of {len(study.trials())} trials of {study.name} so far: trial {best.number},"
        f" {study.metric} {best.value:.4f}.\n"
        f"# python -m simsiam_dali.train --config {path}\n"
        f"{study.space.config(best.params, encoder__epochs=epochs).to_yaml()}"
    )
    with atomic_write(path) as part:
        part.write_text(content)


def write_table(study: Study, path: Path) -> None:
    """Write one row per trial: number, state, value, epochs, seconds, reason, and the sampled settings."""
    frame = study.optuna.trials_dataframe(attrs=("number", "state", "value", "datetime_start", "duration", "params"))
    trials = study.trials()
    frame["epochs"] = [t.last_step or 0 for t in trials]
    frame["reason"] = [t.user_attrs.get("reason", KILLED if t.state == TrialState.FAIL else "") for t in trials]
    frame["duration"] = frame["duration"].dt.total_seconds()
    frame = frame.rename(columns={"duration": "seconds"})
    with atomic_write(path) as part:
        frame.to_csv(part, index=False)


def write_plots(study: Study) -> Iterator[Path]:
    """Write Optuna's plots of the study, those for which it has enough complete trials; yield their paths."""
    values = {trial.value for trial in study.trials(TrialState.COMPLETE)}
    wanted: dict[str, Callable[[optuna.Study], object]] = {}
    if values:
        wanted[HISTORY] = plots.plot_optimization_history
    if len(values) > 1:  # importance needs a difference to explain
        wanted[IMPORTANCE] = plots.plot_param_importances
    for name, plot in wanted.items():
        path = study.folder / name
        with warnings.catch_warnings(), atomic_write(path) as part:
            warnings.simplefilter("ignore")  # that the plots are experimental, and that trials are few
            plot(study.optuna)
            figure = pyplot.gcf()
            figure.set_size_inches(9, 5)
            figure.savefig(part, format="png", dpi=110, bbox_inches="tight")
        pyplot.close(figure)
        yield path
