"""The study: trials in a database that several processes share, and that outlives each of them.

Locked files tell who is alive: the search and its training process hold the trial's lock for as long as either lives,
however they die, so a trial that is running by the database but whose lock is free was killed. Locks reach as far as
`train.runs_dir` does: one machine, or a file system that several share.

The draws of trial n depend on `train.seed`, n and the trials that ended before it: a search by one process comes out
the same when repeated, and two processes never draw alike.
"""

import fcntl
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import IO, Any, Literal

import numpy as np
import optuna
import sqlalchemy.exc
from optuna.trial import FrozenTrial, TrialState

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.schema import Config
from simsiam_dali.search.space import Space
from simsiam_dali.search.trial import Ending, drop_checkpoint
from simsiam_dali.tracking.run import flat

DIRECTIONS: dict[str, Literal["minimize", "maximize"]] = {
    "knn/artist": "maximize",
    "knn/genre": "maximize",
    "knn/rating_mae": "minimize",
    "knn/rating_correlation": "maximize",
}

FREE = (
    *("hpo.trials", "hpo.storage", "hpo.study_name", "hpo.pruner.", "hpo.space."),
    *("encoder.epochs", "encoder.final_training_epochs", "data.shards", "data.threads", "data.prefetch", "mlflow."),
    *("train.device", "train.compile", "train.channels_last", "train.runs_dir", "train.run_name"),
    *("train.log_every", "train.checkpoint_every", "train.profile"),
)
"""Settings that may differ from one process of a study to another: none changes what a trial's value means."""

LOCK_SECONDS = 60
"""How long to wait for another process's write to an SQLite file."""

STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}


@dataclass(frozen=True)
class Claim:
    """A trial that this process is to run."""

    trial: optuna.Trial
    folder: Path
    lock: IO[str]

    @property
    def repeats(self) -> int | None:
        """The number of an earlier trial with the same draws, which only a space of few values can give."""
        tried = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        for other in self.trial.study.get_trials(deepcopy=False, states=tried):
            if other.number < self.trial.number and other.params == self.trial.params:
                return other.number
        return None


class Study:
    """The study that the config names, made if it is not there.

    fingerprint: of the shards. Raises UserError when it was begun with other settings.
    """

    def __init__(self, config: Config, fingerprint: str, space: Space) -> None:
        hpo = config.hpo
        self.metric, self.mean_epochs, self.epochs = hpo.metric, hpo.mean_epochs, hpo.epochs
        self.total, self.seed, self.space = hpo.trials, config.train.seed, space
        self.maximize = DIRECTIONS[hpo.metric] == "maximize"
        self.name = hpo.study_name or f"{config.encoder.encoder_type}-{fingerprint[:8]}"
        if Path(self.name).name != self.name:
            raise UserError(f"hpo.study_name is {self.name!r}, and it names a folder: use no slashes")
        self.folder = config.train.runs_dir / "hpo" / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self.locked():
            self.optuna = _open(config, self.name)
            self._check_same(comparable(config, fingerprint, space))

    def _check_same(self, now: dict[str, Any]) -> None:
        begun = self.optuna.user_attrs.get("settings")
        if begun is None:
            self.optuna.set_user_attr("settings", now)
            return
        for key in sorted(begun.keys() | now.keys()):
            if begun.get(key) != now.get(key):
                raise UserError(
                    f"study {self.name} was begun with {key} = {begun.get(key)}, and now it is {now.get(key)}, so that"
                    " its trials would not compare: keep to the former, or begin another with --study-name"
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among the processes that write below `train.runs_dir`/hpo."""
        with (self.folder.parent / ".lock").open("w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials, or those in the given states, by number."""
        return self.optuna.get_trials(deepcopy=False, states=states or None)

    def best(self) -> FrozenTrial | None:
        """The complete trial of the best value, the first of equals."""
        sign = -1 if self.maximize else 1
        return min(self.trials(TrialState.COMPLETE), key=lambda t: sign * (t.value or 0.0), default=None)

    def fail_killed(self) -> list[int]:
        """Mark the running trials whose process is gone as failed. Returns their numbers. Call it `locked`."""
        killed = []
        for trial in self.trials(TrialState.RUNNING):
            path = self.trial_folder(trial.number) / "lock"
            if path.exists() and (lock := try_lock(path)):
                with lock:
                    # It may have ended, and let go of its lock, since the study was asked; asked again, it says so.
                    if self.trials()[trial.number].state != TrialState.RUNNING:
                        continue
                    self.optuna.tell(trial.number, state=TrialState.FAIL)
                    drop_checkpoint(path.parent)
                    killed.append(trial.number)
        return killed

    def trial_folder(self, number: int) -> Path:
        """Where a trial's run writes."""
        return self.folder / f"trial-{number:04d}"

    def claim(self) -> Claim | None:
        """Draw the next trial; None when the study has as many as were asked for. Call it `locked`."""
        number = len(self.trials())
        if number >= self.total:
            return None
        folder = self.trial_folder(number)
        folder.mkdir(exist_ok=True)
        if any(path.name != "lock" for path in folder.iterdir()):
            raise UserError(
                f"{folder} is there, but the database knows no trial {number}: move {self.folder} away, or begin"
                " another study with --study-name"
            )
        # The lock comes first, so that there is no moment at which the trial runs by the database and nobody holds it.
        lock = try_lock(folder / "lock")
        if lock is None:
            raise UserError(f"{folder}/lock is held by a process of another study: use another --study-name")
        entropy = np.random.SeedSequence([self.seed, number]).generate_state(1)[0]
        self.optuna.sampler = optuna.samplers.TPESampler(seed=int(entropy))
        return Claim(self.optuna.ask(self.space.distributions), folder, lock)

    def hear(self, trial: optuna.Trial, scores: list[float], record: dict[str, Any]) -> Ending | None:
        """Take an epoch's record; the score is added to `scores`. An Ending when the trial is to end here."""
        score = record.get(self.metric, math.nan)
        if not math.isfinite(score):
            return Ending(
                "failed",
                f"there is no {self.metric} on these shards: too few validation songs have what it needs; choose"
                " another with --metric, or complete the tags",
            )
        if not record["epoch"]:  # the untrained encoder is no result
            return None
        scores.append(score)
        trial.report(self.value(scores), record["epoch"])
        if record["epoch"] < self.epochs and trial.should_prune():
            return Ending("pruned", f"after epoch {record['epoch']}")
        return None

    def value(self, scores: list[float]) -> float:
        """What a trial with these scores, one an epoch, comes to: the mean of the last ones, never the best of them."""
        return fmean(scores[-self.mean_epochs :])

    def tell(self, trial: optuna.Trial, ending: Ending, scores: list[float]) -> None:
        """Write down how a trial ended."""
        if ending.reason:
            trial.set_user_attr("reason", ending.reason)
        value = self.value(scores) if ending.state == "complete" else None
        self.optuna.tell(trial, value, STATES.get(ending.state, TrialState.FAIL))


def comparable(config: Config, fingerprint: str, space: Space) -> dict[str, Any]:
    """What has to stay the same for two trials' values to compare, as text by name."""
    fixed = {k: str(v) for k, v in flat(config).items() if not k.startswith(FREE) and k not in space.dimensions}
    searched = {f"hpo.space: {key}": str(dimension) for key, dimension in space.dimensions.items()}
    return {"shards": fingerprint, **fixed, **searched}


def _open(config: Config, name: str) -> optuna.Study:
    hpo = config.hpo
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if hpo.pruner.kind == "median":
        pruner = optuna.pruners.MedianPruner(hpo.pruner.startup_trials, hpo.pruner.warmup_epochs)
    arguments = {"connect_args": {"timeout": LOCK_SECONDS}} if hpo.storage.startswith("sqlite") else {}
    try:
        storage = optuna.storages.RDBStorage(hpo.storage, engine_kwargs=arguments)
        return optuna.create_study(
            storage=storage, study_name=name, direction=DIRECTIONS[hpo.metric], pruner=pruner, load_if_exists=True
        )  # fmt: skip
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"Optuna cannot open {hpo.storage} ({reason}); mend hpo.storage (--storage)") from e


def try_lock(path: Path) -> IO[str] | None:
    """The file, locked for as long as it is open; None when another process holds it."""
    f = path.open("w")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.close()
        return None
    return f
