"""Folders that lie beside the package in a checkout, and inside it once installed (pyproject.toml maps them)."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def folder(name: str) -> Path:
    """The folder `configs`, `benchmarks` or `tools`, of the installed package or of the checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def config_file(text: str) -> Path:
    """A YAML file by its path or, where there is none, a file of `configs/` by its name: `cpu` is configs/cpu.yaml."""
    given, named = Path(text), folder("configs") / f"{text}.yaml"
    return named if given.name == text and named.is_file() and not given.exists() else given
