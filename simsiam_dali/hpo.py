"""Search for better settings: python -m simsiam_dali.hpo --encoder-type simsiam --trials 20

Trials are short trainings with settings sampled from hpo.space (Optuna's TPE), judged by an online score on validation
songs, never by a loss, and pruned when they fall behind. After a stop or a kill the same command continues with the
next trial; several processes started at once share the study. The best settings are written to
runs/hpo/STUDY/best.yaml, and trained at the end for encoder.final_training_epochs.
"""

import argparse
import functools
import os
import shlex
import sys

from optuna.trial import TrialState

import simsiam_dali.data.dali  # noqa: F401 - a missing DALI is reported here, and not by each trial
from simsiam_dali.common.distributed import choose_device
from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.common.signals import Interrupt
from simsiam_dali.common.terminal import print_line
from simsiam_dali.config.cli import add_config, add_setting, create_parser, describe_source, given_settings
from simsiam_dali.config.load import default_config_file, load_config
from simsiam_dali.config.schema import Config
from simsiam_dali.data.shards import open_shards
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.search import trials
from simsiam_dali.search.report import StudyRun
from simsiam_dali.search.study import Study


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = create_parser("hpo", __doc__)
    setting = functools.partial(add_setting, parser)
    add_config(parser, "YAML settings, or a name of configs/ such as demo (default: gpu or cpu)")
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
    return parser


def configure(args: argparse.Namespace) -> Config:
    """Load the settings, and print where they come from."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a trial is trained by one process: start this command several times, without torchrun")
    given = given_settings(args)
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
    encoder_type(config)  # raises for an unknown one
    shards = open_shards(config.data.shards)
    with Interrupt() as interrupt:
        study = Study(config, shards.fingerprint)
        with study.locked():
            parent = StudyRun(study)
        hpo, val = study.hpo, shards.songs["split"].eq("val").sum()
        print_line(
            f"study {study.name} in {hpo.storage}: {len(study.trials())} of {hpo.trials} trials so far, each of"
            f" {hpo.epochs} epochs, judged by {hpo.metric} on {val} validation songs"
        )
        print_line(f"each trial's output is in {study.folder}/trial-NNNN/{trials.LOG}")
        status = "FAILED"
        try:
            trials.search(study, parent, interrupt)
            status = "KILLED" if interrupt.signal else "FINISHED"
        finally:
            best = trials.close(study, parent, status)
        if interrupt.signal:
            command = shlex.join(["python", "-m", "simsiam_dali.hpo", *sys.argv[1:]])
            print_line(f"stopped: the same command continues with trial {len(study.trials())}: {command}")
            sys.exit(128 + interrupt.signal)
        print_line("more       the same command with a larger --trials; several processes at once share the study")
        if running := study.trials(TrialState.RUNNING):
            print_line(f"trials {', '.join(str(t.number) for t in running)} are still running in other processes")
        elif best and not args.no_final and (code := trials.train_best(study, best, interrupt)):
            sys.exit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    main()
