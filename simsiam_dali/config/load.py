"""Where each setting's value comes from: defaults < YAML file < environment < command line.

An unknown key, a wrong type or a value out of range is a `UserError` that names the key, the allowed values and the
nearest known key.
"""

import difflib
import reprlib
import types
import typing
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from simsiam_dali.common import shipped
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.schema import Config, setting_fields

ENVIRONMENT = {"ENCODER_TYPE": "encoder.encoder_type", "MLFLOW_TRACKING_URI": "mlflow.tracking_uri"}


def allowed(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type annotation in a user's words: `a | b`, `[number, number]`, `true or false`, `a number (0 to 1)`.

    metadata: the bounds that pydantic keeps beside it.
    """
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _bounds(metadata)
    words = {bool: "true or false", str: "text", Path: "a path"}
    if annotation is None or annotation is types.NoneType:
        return "null"
    if annotation in words:
        return words[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is Annotated:
        return allowed(args[0], args[1:])
    if origin is dict:
        return "a mapping"
    if origin is tuple:
        return f"[{', '.join('...' if a is Ellipsis else allowed(a) for a in args)}]"
    return " or ".join(allowed(a, metadata) for a in args)


def _bounds(metadata: Iterable[Any]) -> str:
    """` (0 to 1)`, ` (1 or more)`, ` (above 0)`; nothing where there are none."""
    bound: dict[str, float] = {}
    for each in metadata:
        for constraint in each.metadata if isinstance(each, FieldInfo) else [each]:
            bound |= {name: getattr(constraint, name) for name in ("ge", "gt", "le", "lt") if hasattr(constraint, name)}
    low = f"{bound['ge']:g}" if "ge" in bound else f"above {bound['gt']:g}" if "gt" in bound else ""
    high = f"{bound['le']:.10g}" if "le" in bound else f"below {bound['lt']:.10g}" if "lt" in bound else ""
    if low and high:
        return f" ({low} to {high})"
    if low:
        return f" ({low} or more)" if "ge" in bound else f" ({low})"
    return f" ({high})" if "lt" in bound else f" (at most {high})" if high else ""


def _nearest(key: str) -> str:
    section, _, leaf = key.rpartition(".")

    def likeness(name: str) -> float:
        there, _, known = name.rpartition(".")
        return difflib.SequenceMatcher(None, leaf, known).ratio() + 0.1 * (section == there)

    best = max((name for name, _ in setting_fields()), key=likeness)
    return f"; did you mean {best}?" if likeness(best) >= 0.6 else ""


def _setting(error: ErrorDetails, fields: Container[str]) -> str:
    """The setting that an error is of, or the section whose settings do not fit together."""
    # A union's or tuple's location goes on below the setting itself, so cut it back to the setting's name.
    parts = [str(p) for p in error["loc"]]
    return next((k for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in fields), ".".join(parts))


def _explain(first: ErrorDetails, source: str) -> UserError:
    fields = dict(setting_fields())
    key = _setting(first, fields)
    if first["type"] == "extra_forbidden":
        siblings = [n for n, _ in setting_fields() if n.rpartition(".")[0] == key.rpartition(".")[0]]
        tail = _nearest(key) or (
            f"; known here: {', '.join(n.rpartition('.')[2] for n in siblings)}" if siblings else ""
        )
        return UserError(f"{source}: unknown setting {key}{tail}")
    message = first["msg"].removeprefix("Value error, ")
    if key not in fields:
        return UserError(f"{source}: {key}: {message}" if key else f"{source}: {message}")
    value = first["input"]
    may_be = allowed(fields[key].annotation, fields[key].metadata)
    return UserError(f"{source}: {key} = {reprlib.repr(value)} is refused ({message}); allowed: {may_be}")


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **base,
        **{
            k: _merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
            for k, v in over.items()
        },
    }


def _yaml(text: str) -> Any:
    """Plain values only; whatever is wrong with it is a YAMLError."""
    try:
        return yaml.safe_load(text)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as e:
        # PyYAML lets these escape: a thirteenth month, a number of 5,000 digits, !!bool maybe, [[[[[...
        raise yaml.YAMLError(str(e)) from e


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = _yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in shipped.folder("configs").glob("*.yaml")))
        is_name = path.name == str(path) == path.stem
        raise UserError(f"no config file {path}" + (f"; by name there are {names}" if is_name else "")) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"config file {path} is not readable YAML: {' '.join(str(e).split())}") from None
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"config file {path} holds no settings (a mapping of keys is expected)")
    return tree or {}


def _sources(
    path: Path | None,
    environment: Mapping[str, str] | None,
    command_line: Mapping[str, Any] | None,
    assignments: Iterable[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each source's name and what it sets, in rising priority."""
    if path is not None:
        yield str(path), _read_yaml(path)
    for variable, key in ENVIRONMENT.items():
        if value := (environment or {}).get(variable):
            yield f"environment {variable}", _nested(key, value)
    for key, value in (command_line or {}).items():
        if value is not None:
            yield "command line", _nested(key, value)
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign:
            raise UserError(f"--set {assignment}: expected key=value, such as --set encoder.epochs=5")
        try:
            value = _yaml(text)
        except yaml.YAMLError:
            raise UserError(f"--set {assignment}: the value is not readable YAML") from None
        yield f"--set {assignment}", _nested(key.strip(), value)


def sources_of(
    key: str,
    path: Path | None = None,
    environment: Mapping[str, str] | None = None,
    command_line: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> list[tuple[str, Any]]:
    """Every source that sets `key`, with its value, the one that wins last; empty where it has its default."""
    found = []
    for source, tree in _sources(path, environment, command_line, assignments):
        node: Any = tree
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            found.append((source, node))
    return found


def load_config(
    path: Path | None = None,
    environment: Mapping[str, str] | None = None,
    command_line: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
    base: Mapping[str, Any] | None = None,
) -> Config:
    """Build the config; later sources win.

    base: a tree to start from, such as a checkpoint's. path: a YAML file. environment: read for the variables in
    `ENVIRONMENT`. command_line: dotted key -> value (None = not given). assignments: `a.b=c` strings from `--set`, the
    value parsed as YAML.
    Raises UserError naming the source (file, variable or option), the key, and what is allowed.
    """
    tree = _merged({}, base or {})
    fields = dict(setting_fields())
    unfit: tuple[ErrorDetails, str] | None = None
    for source, part in [("config", {}), *_sources(path, environment, command_line, assignments)]:
        tree = _merged(tree, part)
        try:
            config, unfit = Config.model_validate(tree), None
        except ValidationError as e:
            errors = e.errors()
            of_one = [own for own in errors if own["type"] == "extra_forbidden" or _setting(own, fields) in fields]
            if of_one:
                raise _explain(of_one[0], source) from None
            # Settings that do not fit together: a later source may set the one that makes them fit.
            unfit = errors[0], unfit[1] if unfit else source
    if unfit:
        raise _explain(*unfit)
    return config


def replace_settings(config: Config, **values: object) -> Config:
    """The same with other settings, by dotted key with __ for the dot; None leaves a setting as it is."""
    over = {key.replace("__", "."): value for key, value in values.items()}
    return load_config(base=config.model_dump(mode="json"), command_line=over)


def default_config_file(device: str) -> Path:
    """`configs/gpu.yaml` for "cuda"; else `configs/cpu.yaml`, sized for two cores and 8 GB."""
    return shipped.folder("configs") / ("gpu.yaml" if device == "cuda" else "cpu.yaml")
