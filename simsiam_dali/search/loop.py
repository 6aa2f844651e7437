"""The search loop of one process: trials until the study is complete, the study's files, and the final training."""

import functools
import os
import shlex
import subprocess
import sys
import time
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.signals import Interrupt
from simsiam_dali.config.load import ENVIRONMENT
from simsiam_dali.config.schema import Config
from simsiam_dali.search import report, trial
from simsiam_dali.search.mlflow_run import StudyRun
from simsiam_dali.search.study import Claim, Study, try_lock
from simsiam_dali.tracking.client import viewing_hints
from simsiam_dali.training import checkpoint

MAX_FAILURES = 3
"""The search ends after this many failed trials when none has succeeded: the sampled settings are not the cause."""

TRIAL_SETTINGS = {
    "mlflow__log_checkpoint": False,
    "train__run_name": None,
    "train__checkpoint_every": 0,
    "train__validate_every": 1,  # the pruner and the value need the score of each epoch
    "train__profile": 0,
}

print_line = functools.partial(tqdm.write, file=sys.stdout)


def search(study: Study, parent: StudyRun, interrupt: Interrupt) -> None:
    """Run trials until the study has `hpo.trials` of them, or a signal is received.

    Raises UserError after MAX_FAILURES failed trials when none has succeeded.
    """
    failures = 0
    while not interrupt.signal:
        with study.locked():
            killed = study.fail_killed()
            parent.trials_killed(killed)
            claim = study.claim()
        for number in killed:
            print_line(report.trial_line(study, number))
        if claim is None:
            return
        with claim.lock:
            result = run_trial(study, parent, claim, interrupt)
        print_line(report.trial_line(study, claim.trial.number))
        with study.locked():
            report.write_best(study, study.folder / report.BEST)
            report.write_table(study, study.folder / report.TABLE)
            parent.trial_ended(claim.trial.number)
        failures += result.state == "failed"
        if failures >= MAX_FAILURES and not study.trials(TrialState.COMPLETE, TrialState.PRUNED):
            raise UserError(f"{failures} trials failed and none succeeded; the last failed with: {result.reason}")


def run_trial(study: Study, parent: StudyRun, claim: Claim, interrupt: Interrupt) -> trial.TrialResult:
    """Train with the trial's sampled settings, and record the result in the study."""
    number = claim.trial.number
    scores: list[float] = []
    bar = tqdm(total=study.epochs, desc=f"trial {number} of {study.total}", unit="epoch", leave=False, disable=None)

    def on_epoch(record: dict[str, Any]) -> trial.TrialResult | None:
        result = study.report_epoch(claim.trial, scores, record)
        bar.update(record["epoch"] - bar.n)
        bar.set_postfix_str(f"{study.metric} {record.get(study.metric, float('nan')):.3f}")
        return result

    with bar:
        if (earlier := claim.duplicate_of) is not None:
            result = trial.TrialResult("failed", f"the same settings as trial {earlier}: not trained again")
        else:
            try:
                config = study.space.config(claim.trial.params, encoder__epochs=study.epochs, **TRIAL_SETTINGS)
                job = trial.Job(config, claim.folder, parent.trial_tags(number), claim.lock.fileno())
                result = trial.run(job, on_epoch, lambda: bool(interrupt.signal))
            except UserError as e:  # sampled settings that are invalid together
                result = trial.TrialResult("failed", str(e))
    study.record_result(claim.trial, result, scores)
    return result


def close(config: Config, study: Study, parent: StudyRun, status: str) -> FrozenTrial | None:
    """Write and upload the study's files, and print where they are; returns the best trial."""
    with study.locked():
        parent.trials_killed(study.fail_killed())
        report.write_best(study, study.folder / report.BEST)
        report.write_table(study, study.folder / report.TABLE)
        plots = list(report.write_plots(study))
        best = study.best()
        files = [study.folder / name for name in ([report.BEST] if best else []) + [report.TABLE]]
        parent.end(status, files + plots)
    print_line(report.count_line(study))
    if best:
        ties = sum(t.value == best.value for t in study.trials(TrialState.COMPLETE)) - 1
        value = f"{study.metric} {best.value:.3f}" + (f" (the first of {ties + 1} equal trials)" if ties else "")
        print_line(f"best       trial {best.number}: {value}; {report.params_text(best, study.space)}")
        print_line(f"settings   {study.folder / report.BEST}")
    print_line(f"trials     {', '.join(map(str, [study.folder / report.TABLE, *plots]))}")
    for line in viewing_hints(config.mlflow):
        print_line(line)
    return best


def train_best(config: Config, study: Study, best: FrozenTrial, interrupt: Interrupt) -> int:
    """Train the best settings for `encoder.final_training_epochs`, or resume that; returns the exit status.

    Runs the training command on best.yaml, which a user can run too.
    """
    lock = try_lock(study.folder / "final.lock")
    if lock is None:
        print_line("another process is already training the best settings")
        return 0
    name = f"hpo-{study.name}-trial-{best.number:04d}"
    run_dir = config.train.runs_dir / name
    options = ["--config", str(study.folder / report.BEST), "--run-name", name]
    if (run_dir / checkpoint.FILE_NAME).exists():
        epochs = checkpoint.load(run_dir / checkpoint.FILE_NAME)["epoch"]
        if epochs >= config.encoder.final_training_epochs:
            print_line(f"the best settings are already trained: {run_dir}")
            return 0
        options = ["--resume", str(run_dir)]
    command = ["python", "-m", "simsiam_dali.train", *options]
    print_line(f"training the best settings for {config.encoder.final_training_epochs} epochs: {shlex.join(command)}")
    sys.stdout.flush()
    # best.yaml is complete: a variable that this command's options override must not override them there.
    environment = {key: value for key, value in os.environ.items() if key not in ENVIRONMENT}
    with lock, subprocess.Popen([sys.executable, *command[1:]], env=environment) as process:
        terminated = False
        while process.poll() is None:
            time.sleep(trial.POLL_SECONDS)
            if interrupt.signal and not terminated:
                process.terminate()
                terminated = True
    return process.returncode
