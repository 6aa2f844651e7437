"""The study: trials in a database that several processes share, and that survives each of them.

File locks show which processes are alive: the search and its training process hold the trial's lock until both have
exited, in whatever way, so a trial whose state is running but whose lock is free was killed. The locks work where
`train.runs_dir` is shared: on one machine, or on a file system that several machines mount.

The sampled settings of trial n depend on `train.seed`, n and the trials that ended before it: a search by one process
is reproducible, and two processes never sample the same settings.
"""

import fcntl
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Literal

import numpy as np
import optuna
import sqlalchemy.exc
from optuna.trial import FrozenTrial, TrialState

from simsiam_dali.common.errors import UserError, one_line
from simsiam_dali.common.files import locked
from simsiam_dali.config.schema import Config, flat
from simsiam_dali.search.space import Space

MINIMIZED = ("knn/rating_mae",)  # the metrics that are errors; the others are scores

MAY_DIFFER = (
    *("hpo.trials", "hpo.storage", "hpo.study_name", "hpo.pruner.", "hpo.space."),
    *("encoder.epochs", "encoder.final_training_epochs", "data.shards", "data.threads", "data.prefetch", "mlflow."),
    *("train.device", "train.compile", "train.channels_last", "train.runs_dir", "train.run_name"),
    *("train.log_every", "train.checkpoint_every", "train.profile", "train.validate_every", "train.closing_score"),
)
"""Settings that may differ between the processes of a study: trials stay comparable, or set their own."""

SQLITE_TIMEOUT = 60
"""Seconds to wait for another process's write to an SQLite file."""


class Study:
    """Opens the study that the config names, or creates it.

    fingerprint: of the shards. Raises UserError for a wrong `hpo.space`, and when the study was started with
    other settings.
    """

    def __init__(self, config: Config, fingerprint: str) -> None:
        self.config, self.hpo, self.space = config, config.hpo, Space(config)
        self.name = self.hpo.study_name or f"{config.encoder.encoder_type}-{fingerprint[:8]}"
        if Path(self.name).name != self.name:
            raise UserError(f"hpo.study_name is {self.name!r}, which becomes a folder's name: use no slashes")
        self.folder = config.train.runs_dir / "hpo" / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self.locked():
            self.optuna = self._open()
            self._check_unchanged(fingerprint)

    def _open(self) -> optuna.Study:
        hpo = self.hpo
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if hpo.pruner.kind == "median":
            pruner = optuna.pruners.MedianPruner(hpo.pruner.startup_trials, hpo.pruner.warmup_epochs)
        arguments = {"connect_args": {"timeout": SQLITE_TIMEOUT}} if hpo.storage.startswith("sqlite") else {}
        direction: Literal["minimize", "maximize"] = "minimize" if hpo.metric in MINIMIZED else "maximize"
        try:
            storage = optuna.storages.RDBStorage(hpo.storage, engine_kwargs=arguments)
            return optuna.create_study(
                storage=storage, study_name=self.name, direction=direction, pruner=pruner, load_if_exists=True
            )
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, RuntimeError) as e:
            raise UserError(f"Optuna cannot open {hpo.storage} ({one_line(e)}): correct hpo.storage (--storage)") from e

    def _check_unchanged(self, fingerprint: str) -> None:
        """Refuse settings whose trials would not compare with those of the study."""
        now = {"shards": fingerprint}
        for key, value in flat(self.config).items():
            if not key.startswith(MAY_DIFFER) and key not in self.space.dimensions:
                now[key] = str(value)
        for key, dimension in self.space.dimensions.items():
            now[f"hpo.space: {key}"] = str(dimension)
        started = self.optuna.user_attrs.get("settings")
        if started is None:
            self.optuna.set_user_attr("settings", now)
            return
        for key in sorted(started.keys() | now.keys()):
            if started.get(key) != now.get(key):
                raise UserError(
                    f"study {self.name} was started with {key} = {started.get(key)}, now it is {now.get(key)}: its"
                    " trials would not compare; use the former value, or start another study with --study-name"
                )

    @property
    def final_epochs(self) -> int:
        """Epochs of the training of the best settings."""
        return self.config.encoder.final_training_epochs or self.config.encoder.epochs

    def locked(self) -> AbstractContextManager[None]:
        """Exclude the other processes that write below `train.runs_dir`/hpo."""
        return locked(self.folder.parent / ".lock", wait=True)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials, or those in the given states, by number."""
        return self.optuna.get_trials(deepcopy=False, states=states or None)

    def best(self) -> FrozenTrial | None:
        """The complete trial with the best value, the first of equals."""
        choose = min if self.hpo.metric in MINIMIZED else max
        return choose(self.trials(TrialState.COMPLETE), key=lambda t: t.value or 0.0, default=None)

    def fail_killed(self) -> list[int]:
        """Mark the running trials whose processes have exited as failed; returns their numbers. Call it `locked`."""
        killed = []
        for trial in self.trials(TrialState.RUNNING):
            path = self.trial_folder(trial.number) / "lock"
            if path.exists() and (lock := try_lock(path)):
                with lock:
                    # It may have ended and released its lock since the states were read: read them again.
                    if self.trials()[trial.number].state != TrialState.RUNNING:
                        continue
                    self.optuna.tell(trial.number, state=TrialState.FAIL)
                    remove_checkpoint(path.parent)
                    killed.append(trial.number)
        return killed

    def trial_folder(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.folder / f"trial-{number:04d}"

    def claim(self) -> tuple[optuna.Trial, IO[str]] | None:
        """Sample the next trial, with its lock; None when the study has `hpo.trials` trials. Call it `locked`."""
        number = len(self.trials())
        if number >= self.hpo.trials:
            return None
        folder = self.trial_folder(number)
        folder.mkdir(exist_ok=True)
        if any(path.name != "lock" for path in folder.iterdir()):
            raise UserError(
                f"{folder} exists, but the database has no trial {number}: move {self.folder} away, or start"
                " another study with --study-name"
            )
        # Lock before the trial is in the database: a running trial whose lock is free counts as killed.
        lock = try_lock(folder / "lock")
        if lock is None:
            raise UserError(f"{folder}/lock is held by a process of another study: use another --study-name")
        entropy = np.random.SeedSequence([self.config.train.seed, number]).generate_state(1)[0]
        self.optuna.sampler = optuna.samplers.TPESampler(seed=int(entropy))
        return self.optuna.ask(self.space.distributions), lock


def remove_checkpoint(run_dir: Path) -> None:
    """Remove the checkpoint of a trial, and the temporary file of one whose write was interrupted."""
    for path in run_dir.glob("*checkpoint.*"):
        path.unlink()


def try_lock(path: Path) -> IO[str] | None:
    """The file, locked for as long as it is open; None when another process holds it."""
    f = path.open("w")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.close()
        return None
    return f
