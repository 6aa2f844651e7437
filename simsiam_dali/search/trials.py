"""The search of one process: trials until the study is complete, and the training of the best settings.

A trial is the training command on the sampled settings, judged by the epochs that it writes to metrics.jsonl. It is a
process of its own, so that a crash, the out-of-memory killer or a leak ends only the trial. What it prints is in the
trial's log.txt.
"""

import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import IO, Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.signals import Interrupt
from simsiam_dali.common.terminal import print_line
from simsiam_dali.config.load import ENVIRONMENT
from simsiam_dali.config.schema import Config
from simsiam_dali.evaluation.compare_runs import BEST_OF_TAG
from simsiam_dali.search import report
from simsiam_dali.search.study import Study, remove_checkpoint, try_lock
from simsiam_dali.tracking.client import viewing_hints
from simsiam_dali.training import checkpoint

COMMAND = (sys.executable, "-m", "simsiam_dali.train")
LOG = "log.txt"
POLL_SECONDS = 0.2
"""How often the waiting search looks for new epochs and for a stop request."""

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
_libc = ctypes.CDLL(None)

TRIAL_SETTINGS = {
    "mlflow__log_checkpoint": False,
    "train__checkpoint_every": 0,
    "train__validate_every": 1,  # the pruner and the value need the score of each epoch
    "train__profile": 0,
    "train__closing_score": False,
}

MAX_FAILURES = 3
"""The search ends after this many failed trials when none has succeeded: the sampled settings are not the cause."""


def search(study: Study, parent: report.StudyRun, interrupt: Interrupt) -> None:
    """Run trials until the study has `hpo.trials` of them, or a signal is received.

    Raises UserError after MAX_FAILURES failed trials when none has succeeded.
    """
    failures = 0
    while not interrupt.signal:
        with study.locked():
            for number in study.fail_killed():
                parent.trial_ended(number)
                print_line(report.trial_line(study, number))
            claim = study.claim()
        if claim is None:
            return
        trial, lock = claim
        number = trial.number
        with lock:
            failures += run_trial(study, trial, lock, parent.trial_tags(number), interrupt) == TrialState.FAIL
        print_line(report.trial_line(study, number))
        with study.locked():
            report.write_tables(study)
            parent.trial_ended(number)
        succeeded = study.trials(TrialState.COMPLETE, TrialState.PRUNED)
        if failures >= MAX_FAILURES and not succeeded and not interrupt.signal:
            reason = study.trials()[number].user_attrs["reason"]
            raise UserError(f"{failures} trials failed and none succeeded; the last failed with: {reason}")


def close(study: Study, parent: report.StudyRun, status: str) -> FrozenTrial | None:
    """Write and upload the study's files, and print where they are; returns the best trial."""
    with study.locked():
        for number in study.fail_killed():
            parent.trial_ended(number)
        files = [*report.write_tables(study), *report.write_plots(study)]
        parent.end(status, files)
    for line in [*report.closing_lines(study, files), *viewing_hints(study.config.mlflow)]:
        print_line(line)
    return study.best()


def run_trial(
    study: Study, trial: optuna.Trial, lock: IO[str], tags: Mapping[str, str], interrupt: Interrupt
) -> TrialState:
    """Train with the trial's sampled settings, and store in the study how that ended; returns the state.

    tags: of its MLflow run.
    """
    state, value, reason = TrialState.FAIL, None, ""
    try:
        value = _train(study, trial, lock, tags, interrupt)
        state = TrialState.COMPLETE
    except optuna.TrialPruned as e:
        state, reason = TrialState.PRUNED, str(e)
    except UserError as e:  # also for sampled settings that are invalid together
        reason = str(e)
    if reason:
        trial.set_user_attr("reason", reason)
    study.optuna.tell(trial, value, state)
    return state


def _train(study: Study, trial: optuna.Trial, lock: IO[str], tags: Mapping[str, str], interrupt: Interrupt) -> float:
    """The trial's value: the mean of the last `hpo.mean_epochs` scores, not the best. Raises UserError, TrialPruned."""
    hpo, folder = study.hpo, study.trial_folder(trial.number)
    for other in study.trials(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING):
        if other.number < trial.number and other.params == trial.params:  # only in a space of few values
            raise UserError(f"the same settings as trial {other.number}: not trained again")
    destination = {"train__runs_dir": str(study.folder), "train__run_name": folder.name}
    config = study.space.config(trial.params, encoder__epochs=hpo.epochs, **TRIAL_SETTINGS, **destination)
    scores: list[float] = []
    value = 0.0
    title = f"trial {trial.number} of {hpo.trials}"
    with (
        tqdm(total=hpo.epochs, desc=title, unit="epoch", leave=False, disable=None) as bar,
        contextlib.closing(epochs(config, folder, lock, tags, interrupt)) as records,
    ):
        for record in records:
            score = record.get(hpo.metric)
            if score is None and record["epoch"] and hpo.metric == "knn/rating_correlation":
                score = 0.0  # equal predictions, as of a collapsed encoder: the untrained one was scored on these songs
            if score is None:
                raise UserError(
                    f"{hpo.metric} has no value on these shards: too few validation songs have the tags it needs;"
                    " choose another with --metric, or complete the tags"
                )
            bar.update(record["epoch"] - bar.n)
            bar.set_postfix_str(f"{hpo.metric} {score:.3f}")
            if record["epoch"]:  # 0 is the untrained encoder
                scores.append(score)
                value = fmean(scores[-hpo.mean_epochs :])
                trial.report(value, record["epoch"])
                if record["epoch"] < hpo.epochs and trial.should_prune():
                    raise optuna.TrialPruned(f"after epoch {record['epoch']}")
    return value


def epochs(
    config: Config, run_dir: Path, lock: IO[str], tags: Mapping[str, str], interrupt: Interrupt
) -> Generator[dict[str, Any], None, None]:
    """Train, and yield the record of each epoch; close the iterator to end the training.

    The checkpoint is removed: the best settings are trained again. lock: of the trial, held by the training too.
    Raises UserError when the training fails or is interrupted.
    """
    file, journal, read = run_dir / "config.yaml", run_dir / "metrics.jsonl", 0
    file.write_text(config.to_yaml())
    with (run_dir / LOG).open("wb") as log:
        process = start_training(
            ["--config", str(file)],
            {"MLFLOW_RUN_CONTEXT": json.dumps(dict(tags))},  # from there MLflow takes tags of a run
            stdout=log,
            stderr=log,
            pass_fds=[lock.fileno()],
            start_new_session=True,  # Ctrl-C reaches the search only, which terminates the training
        )
    try:
        while True:
            ended = process.poll() is not None  # asked first: nothing is written after that
            with contextlib.suppress(FileNotFoundError), journal.open("rb") as f:
                f.seek(read)
                for line in f:
                    if not line.endswith(b"\n"):  # still being written
                        break
                    read += len(line)
                    if "epoch" in (record := json.loads(line)):
                        yield record
            if ended:
                break
            if interrupt.signal:
                raise UserError("interrupted")
            time.sleep(POLL_SECONDS)
        if process.returncode:
            raise UserError(_reason(process.returncode, run_dir / LOG))
    finally:
        process.terminate()
        process.wait()
        remove_checkpoint(run_dir)


def _reason(status: int, log: Path) -> str:
    """Why a training failed: the signal that killed it, or its error."""
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
        return f"the training process was killed by {name}{hint}; see {log.name}"
    errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    return f"the training process exited with status {status}; see {log.name}"


def start_training(options: Sequence[str], variables: Mapping[str, str], **more: Any) -> subprocess.Popen[bytes]:
    """Start the training command, which gets SIGTERM when this process is killed. variables: of its environment."""
    parent = os.getpid()

    def terminate_with_parent() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # killed just before
            os.kill(os.getpid(), signal.SIGTERM)

    # The options name a complete config: no variable must override what is in it.
    kept = {key: value for key, value in os.environ.items() if key not in ENVIRONMENT}
    command, environment = [*COMMAND, *options], {**kept, **variables}
    return subprocess.Popen(command, env=environment, preexec_fn=terminate_with_parent, **more)


def train_best(study: Study, best: FrozenTrial, interrupt: Interrupt) -> int:
    """Train the best settings for `Study.final_epochs`, or resume that; returns the exit status.

    Runs the training command on best.yaml, which a user can run too.
    """
    lock = try_lock(study.folder / "final.lock")
    if lock is None:
        print_line("another process is already training the best settings")
        return 0
    name, epochs = f"hpo-{study.name}-trial-{best.number:04d}", study.final_epochs
    run_dir = study.config.train.runs_dir / name
    options = ["--config", str(study.folder / report.BEST), "--run-name", name]
    if (run_dir / checkpoint.FILE_NAME).exists():
        if checkpoint.load(run_dir / checkpoint.FILE_NAME)["epoch"] >= epochs:
            print_line(f"the best settings are already trained: {run_dir}")
            return 0
        options = ["--resume", str(run_dir)]
    command = shlex.join(["python", *COMMAND[1:], *options])
    print_line(f"training the best settings for {epochs} epochs: {command}")
    sys.stdout.flush()
    # MLflow reads these tags when it creates a run; a resumed one has them already.
    tags = {"MLFLOW_RUN_CONTEXT": json.dumps({BEST_OF_TAG: study.name})}
    with lock, start_training(options, tags) as process:
        while process.poll() is None and not interrupt.signal:
            time.sleep(POLL_SECONDS)
        process.terminate()
    return process.returncode
