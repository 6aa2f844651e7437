"""What is told of a study: lines for the terminal, best.yaml, trials.csv and pictures."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import optuna
import optuna.visualization.matplotlib as pictures
from matplotlib import pyplot
from optuna.trial import FrozenTrial, TrialState

from simsiam_dali.config.schema import Config
from simsiam_dali.search.space import Space
from simsiam_dali.search.study import Study

matplotlib.use("Agg")

BEST, TABLE, HISTORY, IMPORTANCE = "best.yaml", "trials.csv", "history.png", "importance.png"
KILLED = "its process was killed"


def drawn(trial: FrozenTrial, space: Space) -> str:
    """What a trial drew, by the settings' last names."""

    def show(value: object) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(show, value))}]"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return "  ".join(f"{k.rpartition('.')[2]} {show(space.dimensions[k].value(v))}" for k, v in trial.params.items())


def trial_line(study: Study, number: int) -> str:
    """One trial in one line, and the best one so far."""
    trial, best = study.trials()[number], study.best()
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    reason = trial.user_attrs.get("reason", KILLED)
    ends = {
        TrialState.COMPLETE: f"{study.metric} {trial.value or 0.0:.3f}",
        TrialState.PRUNED: f"pruned {reason}",
        TrialState.FAIL: f"failed: {reason}",
    }
    so_far = f"best {best.value:.3f} (trial {best.number})" if best else "none complete yet"
    return (
        f"trial {number} of {study.total}  {ends[trial.state]}  {so_far}  {seconds:.0f} s  {drawn(trial, study.space)}"
    )


def count_line(study: Study) -> str:
    """How many trials ended how."""
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
    """The best trial's settings as a config file for training, once a trial is complete."""
    if not (best := study.best()):
        return
    config = best_config(study, best)
    content = (
        f"# The best of {len(study.trials())} trials of {study.name} so far: trial {best.number},"
        f" {study.metric} {best.value:.4f}.\n"
        f"# python -m simsiam_dali.train --config {path}\n{config.to_yaml()}"
    )
    part = path.with_suffix(".part")
    part.write_text(content)
    part.replace(path)


def best_config(study: Study, best: FrozenTrial) -> Config:
    """The settings of the final training."""
    return study.space.config(best.params, encoder__epochs=study.space.base["encoder"]["final_training_epochs"])


def write_table(study: Study, path: Path) -> None:
    """One row a trial: number, state, value, epochs, seconds, reason, and what was drawn."""
    frame = study.optuna.trials_dataframe(attrs=("number", "state", "value", "datetime_start", "duration", "params"))
    trials = study.trials()
    frame["epochs"] = [t.last_step or 0 for t in trials]
    frame["reason"] = [t.user_attrs.get("reason", KILLED if t.state == TrialState.FAIL else "") for t in trials]
    frame["duration"] = frame["duration"].dt.total_seconds()
    frame = frame.rename(columns={"duration": "seconds"})
    part = path.with_suffix(".part")
    frame.to_csv(part, index=False)
    part.replace(path)


def draw(study: Study) -> Iterator[Path]:
    """Optuna's pictures of the study, those that it has enough complete trials for."""
    values = {trial.value for trial in study.trials(TrialState.COMPLETE)}
    wanted: dict[str, Callable[[optuna.Study], object]] = {}
    if values:
        wanted[HISTORY] = pictures.plot_optimization_history
    if len(values) > 1:  # nothing explains a difference that is not there
        wanted[IMPORTANCE] = pictures.plot_param_importances
    for name, plot in wanted.items():
        path = study.folder / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "experimental", and of too few trials: both known
            plot(study.optuna)
            figure = pyplot.gcf()
            figure.set_size_inches(9, 5)
            figure.savefig(path.with_suffix(".part.png"), dpi=110, bbox_inches="tight")
        pyplot.close(figure)
        path.with_suffix(".part.png").replace(path)
        yield path
