"""Train an encoder: python -m simsiam_dali.train --encoder-type simsiam

Settings come from the config file, the environment (ENCODER_TYPE, MLFLOW_TRACKING_URI) and the command line; later ones
override earlier ones. Without --config, the file is configs/gpu.yaml if there is a GPU, else configs/cpu.yaml. Several
GPUs: torchrun --nproc-per-node N -m simsiam_dali.train ...
"""

import argparse
import functools
import os
import sys
import time
from pathlib import Path

import torch

from simsiam_dali.common.distributed import World, choose_device, is_main, process_group, report_error_once
from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.config.cli import add_config, add_setting, create_parser, describe_source, given_settings
from simsiam_dali.config.load import default_config_file, load_config
from simsiam_dali.config.schema import Config, flat
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training import checkpoint
from simsiam_dali.training.loop import train
from simsiam_dali.training.memory import out_of_memory_as_one_error, refuse_out_of_memory
from simsiam_dali.training.world_size import rescale_batch_size

CHANGEABLE = (
    "train.log_every", "train.checkpoint_every", "train.validate_every", "train.profile", "data.threads",
    "data.prefetch", "data.max_bad_fraction", "data.shards", "train.device", "train.closing_score", "mlflow.",
)  # fmt: skip
"""Settings a resumed run may change: none of them changes the next loss (the device: `checkpoint.check_device`)."""

OUT_OF_MEMORY_ADVICE = (
    "use a smaller train.micro_batch (the first lines show the one in use), shorter views (--set data.view_seconds=...)"
    " or --set train.activation_checkpointing=true"
)


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = create_parser("train", __doc__)
    setting = functools.partial(add_setting, parser)
    add_config(parser, "YAML settings, or a name of configs/ such as demo (default: gpu or cpu)")
    setting("--encoder-type", "encoder.encoder_type", "TYPE")
    setting("--shards", "data.shards", "DIR")
    setting("--epochs", "encoder.epochs", "N")
    setting("--batch-size", "encoder.batch_size", "N")
    setting("--device", "train.device", choices=["auto", "cpu", "gpu"])
    setting("--seed", "train.seed", "N")
    setting("--profile", "train.profile", "N")
    setting("--run-name", "train.run_name", "NAME")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="RUN",
        help="continue a stopped run: its folder, its checkpoint, or the newest run when no name is given",
    )  # fmt: skip
    return parser


def new_run(args: argparse.Namespace) -> tuple[Config, Path]:
    """(settings, folder) of a new run. Raises UserError where the folder holds a run already."""
    given = given_settings(args)
    file = args.config or default_config_file(choose_device(given.get("train.device", "auto")).type)
    config = load_config(file, os.environ, given, args.assignments)
    kind = encoder_type(config)
    if is_main():
        print(f"settings from {file}, then the environment and the command line")
        print(describe_source("encoder.encoder_type", file, given, args.assignments))
    name = config.train.run_name or f"{config.encoder.encoder_type}-{kind.variant}-{time.strftime('%Y%m%d-%H%M%S')}"
    if Path(name).name != name or name == "..":
        raise UserError(f"train.run_name is {name}, which is no folder's name; train.runs_dir says where it is made")
    run_dir = config.train.runs_dir / name
    if (run_dir / checkpoint.FILE_NAME).exists():
        raise UserError(
            f"{run_dir} already holds a run: choose another --run-name, or continue with --resume {run_dir}"
        )
    return config, run_dir


def resumed_run(args: argparse.Namespace) -> tuple[Config, Path, checkpoint.Checkpoint]:
    """(settings, folder, checkpoint) of the run to continue. Raises UserError for settings that it cannot change."""
    given = given_settings(args)
    path = checkpoint.find(args.resume, load_config(None, None, given, args.assignments).train.runs_dir)
    resumed = checkpoint.load(path)
    if args.config:
        raise UserError("--resume uses the run's own settings: leave --config out, or start a new run")
    before = flat(load_config(base=resumed["config"]))
    config = load_config(None, None, given, args.assignments, base=resumed["config"])
    changed = [key for key, value in flat(config).items() if value != before[key]]
    refused = [key for key in changed if not key.startswith(CHANGEABLE)]
    if refused:
        raise UserError(f"--resume cannot change {', '.join(refused)}, the run would not be the same: start a new run")
    return config, path.parent, resumed


@one_line_errors
@report_error_once
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    resumed = None
    if args.resume is None:
        config, run_dir = new_run(args)
    else:
        config, run_dir, resumed = resumed_run(args)
    with process_group(config.train.device) as world:
        if resumed:
            checkpoint.check_device(resumed, world.device, run_dir)
            if len(resumed["loaders"]) != world.size:
                config = rescale_batch_size(config, len(resumed["loaders"]), world.size)
        with refuse_out_of_memory(OUT_OF_MEMORY_ADVICE, f" on {world.device}"):
            signal = train(config, world, resumed, run_dir)
        if config.train.closing_score and not signal:
            print_closing_score(run_dir, world, config.data.shards)
    sys.exit(128 + signal if signal else 0)


def print_closing_score(run_dir: Path, world: World, shards: Path | str) -> None:
    """Print what the trained encoder finds. Raises UserError where it cannot be computed."""
    # Here, since it needs scikit-learn, which training does not.
    from simsiam_dali.embedding.closing_score import closing_score

    complete = f"the training in {run_dir} is complete"
    try:
        with out_of_memory_as_one_error():
            line = closing_score(run_dir, world, shards)
    except KeyboardInterrupt:  # training turns signals into a save
        world.print(f"stopped before the closing score; {complete}")
        sys.exit(130)
    except (UserError, torch.OutOfMemoryError) as e:
        raise UserError(f"{complete}, but not its closing score: {e}") from e
    if line:
        world.print(line)


if __name__ == "__main__":
    main()
