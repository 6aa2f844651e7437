"""Search for better settings: python -m simsiam_dali.hpo --encoder-type simsiam --trials 20

Short trainings with settings drawn from hpo.space (Optuna's TPE), judged by an online score on validation songs, never
by a loss, and given up early when they are worse than the others. Stopped or killed, it goes on with the next trial
when started again; started several times at once, the processes share the study. The best settings are written to
runs/hpo/STUDY/best.yaml, and trained at the end for encoder.final_training_epochs.
"""

import argparse
import functools
import os
import shlex
import subprocess
import sys
import time
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from simsiam_dali.common.distributed import choose_device
from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.common.shipped import config_file
from simsiam_dali.common.signals import Interrupt
from simsiam_dali.config.cli import add_setting, describe_source, program
from simsiam_dali.config.load import ENVIRONMENT, default_config_file, load_config
from simsiam_dali.config.schema import Config
from simsiam_dali.data.shards import open_shards
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.search import report, trial
from simsiam_dali.search.mlflow_run import StudyRun
from simsiam_dali.search.space import Space
from simsiam_dali.search.study import Claim, Study, try_lock
from simsiam_dali.tracking import run as tracking
from simsiam_dali.training import checkpoint

FAILURES = 3
"""So many failed trials, and none that did not, end the search: what is wrong is not what was drawn."""

TRIAL = {
    "mlflow__log_checkpoint": False,
    "train__run_name": None,
    "train__checkpoint_every": 0,
    "train__validate_every": 1,  # the pruner and the value go by each epoch's score
    "train__profile": 0,
}
"""Settings of every trial."""

say = functools.partial(tqdm.write, file=sys.stdout)


def search(study: Study, parent: StudyRun, interrupt: Interrupt) -> None:
    """Run trials until the study has as many as were asked for, or a signal came.

    Raises UserError when nothing but failures came of it.
    """
    failures = 0
    while not interrupt.signal:
        with study.locked():
            killed = study.fail_killed()
            parent.trials_killed(killed)
            claim = study.claim()
        for number in killed:
            say(report.trial_line(study, number))
        if claim is None:
            return
        with claim.lock:
            ending = run_trial(study, parent, claim, interrupt)
        say(report.trial_line(study, claim.trial.number))
        with study.locked():
            report.write_best(study, study.folder / report.BEST)
            report.write_table(study, study.folder / report.TABLE)
            parent.trial_ended(claim.trial.number)
        failures += ending.state == "failed"
        if failures >= FAILURES and not study.trials(TrialState.COMPLETE, TrialState.PRUNED):
            raise UserError(f"{failures} trials failed and none succeeded, the last one so: {ending.reason}")


def run_trial(study: Study, parent: StudyRun, claim: Claim, interrupt: Interrupt) -> trial.Ending:
    """Train with what the trial drew, and tell the study how it ended."""
    number = claim.trial.number
    scores: list[float] = []
    bar = tqdm(total=study.epochs, desc=f"trial {number} of {study.total}", unit="epoch", leave=False, disable=None)

    def on_epoch(record: dict[str, Any]) -> trial.Ending | None:
        ending = study.hear(claim.trial, scores, record)
        bar.update(record["epoch"] - bar.n)
        bar.set_postfix_str(f"{study.metric} {record.get(study.metric, float('nan')):.3f}")
        return ending

    with bar:
        if (earlier := claim.repeats) is not None:
            ending = trial.Ending("failed", f"the same draws as trial {earlier}: nothing to learn from it")
        else:
            try:
                drawn = study.space.config(claim.trial.params, encoder__epochs=study.epochs, **TRIAL)
                job = trial.Job(drawn, claim.folder, parent.trial_tags(number), claim.lock.fileno())
                ending = trial.run(job, on_epoch, lambda: bool(interrupt.signal))
            except UserError as e:  # settings that refuse each other
                ending = trial.Ending("failed", str(e))
    study.tell(claim.trial, ending, scores)
    return ending


def close(config: Config, study: Study, parent: StudyRun, status: str) -> FrozenTrial | None:
    """Write and upload what there is to see, and say where; returns the best trial."""
    with study.locked():
        parent.trials_killed(study.fail_killed())
        report.write_best(study, study.folder / report.BEST)
        report.write_table(study, study.folder / report.TABLE)
        drawings = list(report.draw(study))
        best = study.best()
        files = [study.folder / name for name in ([report.BEST] if best else []) + [report.TABLE]]
        parent.end(status, files + drawings)
    say(report.count_line(study))
    if best:
        equal = sum(t.value == best.value for t in study.trials(TrialState.COMPLETE)) - 1
        shown = f"{study.metric} {best.value:.3f}" + (f", as {equal} more, of which it is the first" if equal else "")
        say(f"best       trial {best.number}: {shown}; {report.drawn(best, study.space)}")
        say(f"settings   {study.folder / report.BEST}")
    say(f"trials     {', '.join(map(str, [study.folder / report.TABLE, *drawings]))}")
    for line in tracking.how_to_look(config):
        say(line)
    return best


def train_best(config: Config, study: Study, best: FrozenTrial, interrupt: Interrupt) -> int:
    """Train the best settings for long, or go on with that; returns the exit status.

    It is the training command, on best.yaml, as the user might type it.
    """
    lock = try_lock(study.folder / "final.lock")
    if lock is None:
        say("another process trains the best settings already")
        return 0
    name = f"hpo-{study.name}-trial-{best.number:04d}"
    run_dir = config.train.runs_dir / name
    options = ["--config", str(study.folder / report.BEST), "--run-name", name]
    if (run_dir / checkpoint.FILE_NAME).exists():
        epochs = checkpoint.load(run_dir / checkpoint.FILE_NAME)["epoch"]
        if epochs >= config.encoder.final_training_epochs:
            say(f"the best settings are trained already: {run_dir}")
            return 0
        options = ["--resume", str(run_dir)]
    command = ["python", "-m", "simsiam_dali.train", *options]
    say(f"the best settings, for {config.encoder.final_training_epochs} epochs: {shlex.join(command)}")
    sys.stdout.flush()
    # best.yaml says all there is to say: a variable that this command's options have overruled must not win there.
    environment = {key: value for key, value in os.environ.items() if key not in ENVIRONMENT}
    with lock, subprocess.Popen([sys.executable, *command[1:]], env=environment) as process:
        asked = False
        while process.poll() is None:
            time.sleep(trial.POLL_SECONDS)
            if interrupt.signal and not asked:
                process.terminate()
                asked = True
    return process.returncode


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = argparse.ArgumentParser(
        prog=program("hpo"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    setting = functools.partial(add_setting, parser)
    parser.add_argument(
        "--config",
        type=config_file,
        metavar="FILE",
        help="YAML settings, or a name of configs/ such as demo (default: gpu or cpu)",
    )
    setting("--encoder-type", "encoder.encoder_type", "TYPE")
    setting("--shards", "data.shards", "DIR")
    setting("--trials", "hpo.trials", "N")
    setting("--epochs", "hpo.epochs", "N")
    setting("--metric", "hpo.metric", "NAME")
    setting("--storage", "hpo.storage", "URL")
    setting("--study-name", "hpo.study_name", "NAME")
    setting("--batch-size", "encoder.batch_size", "N")
    setting("--device", "train.device", choices=["auto", "cpu", "gpu"])
    setting("--seed", "train.seed", "N")
    parser.add_argument("--no-final", action="store_true", help="do not train the best settings at the end")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", dest="assignments",
        help="any setting by its dotted key",
    )  # fmt: skip
    return parser


def configure(args: argparse.Namespace) -> Config:
    """The settings, and a word on where they come from."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a trial is trained by one process: start this command several times, without torchrun")
    given = {key: value for key, value in vars(args).items() if "." in key and value is not None}
    file = args.config or default_config_file(choose_device(given.get("train.device", "auto")).type)
    config = load_config(file, os.environ, given, args.assignments)
    print(f"settings from {file}, then the environment and the command line")
    print(describe_source("encoder.encoder_type", file, given, args.assignments))
    return config


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    config = configure(args)
    encoder_type(config)  # an unknown one is refused
    space = Space(config)
    shards = open_shards(config.data.shards)
    interrupt = Interrupt().__enter__()
    study = Study(config, shards.fingerprint, space)
    with study.locked():
        parent = StudyRun(config, study)
    say(
        f"study {study.name} in {config.hpo.storage}: {len(study.trials())} of {study.total} trials so far, each of"
        f" {study.epochs} epochs, judged by {study.metric} on {(shards.songs['split'] == 'val').sum()} validation songs"
    )
    say(f"each trial's output is in {study.folder}/trial-NNNN/{trial.LOG}")
    status = "FAILED"
    try:
        search(study, parent, interrupt)
        status = "KILLED" if interrupt.signal else "FINISHED"
    finally:
        best = close(config, study, parent, status)
    again = shlex.join(["python", "-m", "simsiam_dali.hpo", *sys.argv[1:]])
    if interrupt.signal:
        say(f"stopped: go on with trial {len(study.trials())} by the same command: {again}")
        sys.exit(128 + interrupt.signal)
    say("more       the same command with a larger --trials; started several times at once, they share the study")
    if running := study.trials(TrialState.RUNNING):
        say(f"trials {', '.join(str(t.number) for t in running)} still run in other processes")
    elif best and not args.no_final and (ended := train_best(config, study, best, interrupt)):
        sys.exit(ended if ended > 0 else 128 - ended)


if __name__ == "__main__":
    main()
