"""Command-line options that are settings: their help comes from the config."""

import argparse
from typing import Any

from simsiam_dali import config as settings


def add_setting(
    parser: argparse.ArgumentParser, option: str, key: str, metavar: str | None = None, **more: Any
) -> None:
    """Add an option for the setting `key`; the parsed value is under that dotted name, None where it was not given."""
    field = dict(settings.fields())[key]
    shown = "null" if field.default is None else field.default
    parser.add_argument(option, dest=key, metavar=metavar, help=f"{field.description} ({key}; default {shown})", **more)
