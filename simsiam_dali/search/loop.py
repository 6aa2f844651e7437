"""The search loop of one process: trials until the study is complete, the study's files, and the final training."""

import functools
import shlex
import sys
import time

from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.signals import Interrupt
from simsiam_dali.search import report, trial
from simsiam_dali.search.report import StudyRun
from simsiam_dali.search.study import Study, try_lock
from simsiam_dali.tracking.client import viewing_hints
from simsiam_dali.training import checkpoint

MAX_FAILURES = 3
"""The search ends after this many failed trials when none has succeeded: the sampled settings are not the cause."""

print_line = functools.partial(tqdm.write, file=sys.stdout)


def search(study: Study, parent: StudyRun, interrupt: Interrupt) -> None:
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
        number = claim.trial.number
        with claim.lock:
            failures += trial.run(study, claim, parent.trial_tags(number), interrupt) == TrialState.FAIL
        print_line(report.trial_line(study, number))
        with study.locked():
            report.write_tables(study)
            parent.trial_ended(number)
        succeeded = study.trials(TrialState.COMPLETE, TrialState.PRUNED)
        if failures >= MAX_FAILURES and not succeeded and not interrupt.signal:
            reason = study.trials()[number].user_attrs["reason"]
            raise UserError(f"{failures} trials failed and none succeeded; the last failed with: {reason}")


def close(study: Study, parent: StudyRun, status: str) -> FrozenTrial | None:
    """Write and upload the study's files, and print where they are; returns the best trial."""
    with study.locked():
        for number in study.fail_killed():
            parent.trial_ended(number)
        files = [*report.write_tables(study), *report.write_plots(study)]
        parent.end(status, files)
    for line in [*report.closing_lines(study, files), *viewing_hints(study.config.mlflow)]:
        print_line(line)
    return study.best()


def train_best(study: Study, best: FrozenTrial, interrupt: Interrupt) -> int:
    """Train the best settings for `encoder.final_training_epochs`, or resume that; returns the exit status.

    Runs the training command on best.yaml, which a user can run too.
    """
    lock = try_lock(study.folder / "final.lock")
    if lock is None:
        print_line("another process is already training the best settings")
        return 0
    name, epochs = f"hpo-{study.name}-trial-{best.number:04d}", study.config.encoder.final_training_epochs
    run_dir = study.config.train.runs_dir / name
    options = ["--config", str(study.folder / report.BEST), "--run-name", name]
    if (run_dir / checkpoint.FILE_NAME).exists():
        if checkpoint.load(run_dir / checkpoint.FILE_NAME)["epoch"] >= epochs:
            print_line(f"the best settings are already trained: {run_dir}")
            return 0
        options = ["--resume", str(run_dir)]
    command = shlex.join(["python", *trial.COMMAND[1:], *options])
    print_line(f"training the best settings for {epochs} epochs: {command}")
    sys.stdout.flush()
    with lock, trial.start_training(options, {}) as process:
        while process.poll() is None and not interrupt.signal:
            time.sleep(trial.POLL_SECONDS)
        process.terminate()
    return process.returncode
