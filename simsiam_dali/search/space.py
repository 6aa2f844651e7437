"""What is searched: the settings of `hpo.space`, each as a distribution to draw from, checked before the first trial.

A range setting (a pair, such as pitch_shift_range) is searched by one number, how far it reaches on both sides of
`around`: the strength of an augmentation, in one dimension.
"""

import copy
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import Config, setting_fields

WORDS = ("low", "high", "log", "around", "choices")

NOT_SEARCHED = {
    "encoder.encoder_type": "each type has a study of its own",
    "encoder.epochs": "trials are of one length, hpo.epochs",
    "encoder.final_training_epochs": "it is no part of a trial",
    "encoder.learning_rate": "search the type's own learning_rate",
    "data.shards": "trials on different data do not compare",
    "data.threads": "it changes the speed alone",
    "data.prefetch": "it changes the speed alone",
}
"""Settings of data. and encoder. that a search has no use for, and why."""


@dataclass(frozen=True)
class Dimension:
    """One setting. `around`: the drawn number is half the width of a range about it."""

    distribution: BaseDistribution
    around: float | None = None

    def value(self, drawn: Any) -> Any:
        """The setting's value for a drawn number or choice."""
        if self.around is not None:
            return [self.around - drawn, self.around + drawn]
        return json.loads(drawn) if isinstance(self.distribution, CategoricalDistribution) else drawn

    def ends(self) -> list[Any]:
        """The values between which, or of which, all others are."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return [self.value(choice) for choice in d.choices]
        assert isinstance(d, IntDistribution | FloatDistribution)
        return [self.value(d.low), self.value(d.high)]


class Space:
    """The dimensions of `hpo.space` for the config's encoder type.

    Raises UserError for a key that is no setting, a value that its setting refuses, or one that would change nothing.
    """

    def __init__(self, config: Config) -> None:
        name = config.encoder.encoder_type
        self.base = config.model_dump(mode="json")
        where = f"hpo.space.{name}"
        described = self.base["hpo"]["space"].get(name)
        if not described:
            raise UserError(f"{where} is empty: say there what to search (docs/config.md)")
        self.dimensions: dict[str, Dimension] = {}
        for key, description in described.items():
            _check_key(key, name, where, self.base)
            try:
                self.dimensions[key] = _dimension(description, dict(setting_fields())[key].annotation is int)
            except ValueError as e:
                raise UserError(f"{where}: {key}: {e}") from None
        for key, dimension in self.dimensions.items():
            for value in dimension.ends():
                try:
                    self._with({key: value})
                except UserError as e:
                    raise UserError(f"{where}: {key} would be {value}: {e}") from None

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """For Optuna, by dotted key."""
        return {key: dimension.distribution for key, dimension in self.dimensions.items()}

    def config(self, drawn: Mapping[str, Any], **fixed: Any) -> Config:
        """The settings with what a trial drew. fixed: more settings, dotted keys with __ for the dot."""
        values = {key: self.dimensions[key].value(value) for key, value in drawn.items()}
        return self._with(values | {key.replace("__", "."): value for key, value in fixed.items()})

    def _with(self, values: Mapping[str, Any]) -> Config:
        tree = copy.deepcopy(self.base)
        for key, value in values.items():
            *path, leaf = key.split(".")
            node = tree
            for part in path:
                node = node[part]
            node[leaf] = value
        return load_config(base=tree)


def _check_key(key: str, encoder_type: str, where: str, base: dict[str, Any]) -> None:
    known = [name for name, _ in setting_fields()]
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        raise UserError(f"{where}: there is no setting {key}" + (f"; did you mean {near[0]}?" if near else ""))
    section, _, rest = key.partition(".")
    if section not in ("data", "encoder"):
        raise UserError(
            f"{where}: {key} cannot be searched: only settings of data. and encoder. change what is learned"
        )
    if reason := NOT_SEARCHED.get(key):
        raise UserError(f"{where}: {key} cannot be searched: {reason}")
    owner, dot, leaf = rest.partition(".")
    if section == "encoder" and dot and owner != encoder_type:
        raise UserError(f"{where}: {key} changes nothing, since encoder.encoder_type is {encoder_type}")
    if section == "encoder" and leaf == "learning_rate" and base["encoder"]["learning_rate"] is not None:
        raise UserError(
            f"{where}: encoder.learning_rate is set and wins over {key}, which is to be searched: set it to null"
        )


def _dimension(description: dict[str, Any], whole: bool) -> Dimension:
    """Raises ValueError in a user's words. whole: the setting takes whole numbers."""
    if unknown := sorted(description.keys() - set(WORDS)):
        raise ValueError(f"unknown {', '.join(unknown)}; known are {', '.join(WORDS)}")
    if "choices" in description:
        choices = description["choices"]
        if len(description) > 1 or not isinstance(choices, list) or not choices:
            raise ValueError("choices is a list of values, and stands alone")
        return Dimension(CategoricalDistribution([json.dumps(choice) for choice in choices]))
    low, high = (_number(description.get(end), end) for end in ("low", "high"))
    log, around = description.get("log", False), description.get("around")
    if not isinstance(log, bool):
        raise ValueError("log is true or false")
    if not low < high:
        raise ValueError(f"low {low:g} is not below high {high:g}")
    if log and low <= 0:
        raise ValueError(f"a logarithmic range begins above 0, and low is {low:g}")
    if around is None and whole and low.is_integer() and high.is_integer():
        return Dimension(IntDistribution(int(low), int(high), log=log))
    return Dimension(FloatDistribution(low, high, log=log), None if around is None else _number(around, "around"))


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)  # YAML reads 1e-4 as text
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"low and high (and around) are numbers, and {name} is {value!r}")
    return number
