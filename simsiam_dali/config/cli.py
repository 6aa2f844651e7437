"""What the commands' parsers share: the program's name, and options that are settings, with the config's help."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simsiam_dali.config.load import sources_of
from simsiam_dali.config.schema import setting_fields

PROGRAM = "simsiam-dali"


def program(command: str) -> str:
    """How `command` was started, for its usage line."""
    called = Path(sys.argv[0]).name
    is_named = called == "make_shards.py" or called.startswith(f"{PROGRAM} ")
    return called if is_named else f"python -m simsiam_dali.{command}"


def add_setting(
    parser: argparse.ArgumentParser, option: str, key: str, metavar: str | None = None, **more: Any
) -> None:
    """Add an option for the setting `key`; the parsed value is under that dotted name, None where it was not given."""
    field = dict(setting_fields())[key]
    shown = "null" if field.default is None else field.default
    parser.add_argument(option, dest=key, metavar=metavar, help=f"{field.description} ({key}; default {shown})", **more)


def describe_source(key: str, file: Path, given: Mapping[str, Any], assignments: Sequence[str]) -> str:
    """One line: the value of `key`, its source, and the values it overrides."""
    sources = sources_of(key, file, os.environ, given, assignments)
    if not sources:
        return f"{key} has its default"
    source, value = sources[-1]
    others = [f"{v} ({s})" for s, v in reversed(sources[:-1]) if v != value]
    return f"{key} = {value} ({source})" + (f", over {', '.join(others)}" if others else "")
