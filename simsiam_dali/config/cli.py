"""What the commands' parsers share: the program's name, common options, and options that are settings."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from simsiam_dali.common.shipped import config_file
from simsiam_dali.config.load import default_config_file, load_config, sources_of
from simsiam_dali.config.schema import Embedding, flat, setting_fields

PROGRAM = "simsiam-dali"


def program(command: str) -> str:
    """How `command` was started, for its usage line."""
    called = Path(sys.argv[0]).name
    is_named = called == "make_shards.py" or called.startswith(f"{PROGRAM} ")
    return called if is_named else f"python -m simsiam_dali.{command}"


def create_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the description as it is written."""
    return argparse.ArgumentParser(
        prog=program(command), description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def whole_number(least: int) -> Callable[[str], int]:
    """An option's type: whole numbers, `least` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} or more")
        return int(text)

    return parse


def add_setting(
    parser: argparse.ArgumentParser, option: str, key: str, metavar: str | None = None, **more: Any
) -> None:
    """Add an option for the setting `key`; the parsed value is under that dotted name, None where it was not given."""
    description, (gpu, cpu) = dict(setting_fields())[key].description, _defaults(key)
    default = gpu if gpu == cpu else f"{gpu} with configs/gpu.yaml, {cpu} with cpu.yaml"
    parser.add_argument(option, dest=key, metavar=metavar, help=f"{description} ({key}; default {default})", **more)


def shown(value: Any) -> str:
    """A setting's value as a config file has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


@functools.cache
def _of_default_file(device: str) -> dict[str, Any]:
    return flat(load_config(default_config_file(device)))


def _defaults(key: str) -> tuple[str, str]:
    """A setting's value where no other config file is chosen: with a GPU, and without."""
    gpu, cpu = (shown(_of_default_file(device)[key]) for device in ("cuda", "cpu"))
    return gpu, cpu


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that options of `add_setting` were given for, by dotted key."""
    return {key: value for key, value in vars(args).items() if "." in key and value is not None}


def add_config(
    parser: argparse.ArgumentParser, config_help: str, set_help: str = "any setting by its dotted key"
) -> None:
    """Add --config FILE, and --set a.b=c as `assignments`."""
    parser.add_argument("--config", type=config_file, metavar="FILE", help=config_help)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="assignments", help=set_help)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint RUN, and --embedding, which output of its encoder."""
    parser.add_argument(
        "--checkpoint", default="", metavar="RUN",
        help="a run's folder or name, or a checkpoint file (default: the newest run in runs/)",
    )  # fmt: skip
    parser.add_argument(
        "--embedding", choices=get_args(Embedding),
        help="what a song's vector is, for an encoder of views (default: the training's encoder.simsiam.embedding)",
    )  # fmt: skip


def add_embeddings(parser: argparse.ArgumentParser) -> None:
    """Add --embeddings FILE."""
    parser.add_argument(
        "--embeddings", type=Path, default=Path("embeddings.parquet"), metavar="FILE",
        help="table written by python -m simsiam_dali.embed (default: %(default)s)",
    )  # fmt: skip


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument(
        "--device", choices=["auto", "cpu", "gpu"], default="auto", help="auto chooses the GPU when there is one"
    )


def describe_source(key: str, file: Path, given: Mapping[str, Any], assignments: Sequence[str]) -> str:
    """One line: the value of `key`, its source, and the values it overrides."""
    sources = sources_of(key, file, os.environ, given, assignments)
    if not sources:
        return f"{key} has its default"
    source, value = sources[-1]
    others = [f"{v} ({s})" for s, v in reversed(sources[:-1]) if v != value]
    return f"{key} = {value} ({source})" + (f", over {', '.join(others)}" if others else "")
