"""The search space: the settings of `hpo.space`, each with its distribution, checked before the first trial.

A range setting (a pair, such as pitch_shift_range) is searched by one number, half its width about the center `around`:
the strength of an augmentation, in one dimension.
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

KEYS = ("low", "high", "log", "around", "choices")

NOT_SEARCHED = {
    "encoder.encoder_type": "each type has a study of its own",
    "encoder.epochs": "trials are of one length, hpo.epochs",
    "encoder.final_training_epochs": "trials do not use it",
    "encoder.learning_rate": "search the type's own learning_rate",
    "data.shards": "trials on different data do not compare",
    "data.threads": "it only changes the speed",
    "data.prefetch": "it only changes the speed",
}
"""Settings of data. and encoder. that cannot be searched, and why."""


@dataclass(frozen=True)
class Dimension:
    """One setting. around: center of a range setting, whose half width is sampled."""

    distribution: BaseDistribution
    around: float | None = None

    def value(self, sampled: Any) -> Any:
        """The setting's value for a sampled number or choice."""
        if self.around is not None:
            return [self.around - sampled, self.around + sampled]
        return json.loads(sampled) if isinstance(self.distribution, CategoricalDistribution) else sampled

    def extremes(self) -> list[Any]:
        """The lowest and the highest value, or all choices."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return [self.value(choice) for choice in d.choices]
        assert isinstance(d, IntDistribution | FloatDistribution)
        return [self.value(d.low), self.value(d.high)]


class Space:
    """The dimensions of `hpo.space` for the config's encoder type.

    Raises UserError for a key that is not a setting, a value that is not allowed, or a setting without effect.
    """

    def __init__(self, config: Config) -> None:
        name = config.encoder.encoder_type
        self.base = config.model_dump(mode="json")
        where = f"hpo.space.{name}"
        described = self.base["hpo"]["space"].get(name)
        if not described:
            raise UserError(f"{where} is empty: list there the settings to search (docs/config.md)")
        self.dimensions: dict[str, Dimension] = {}
        for key, description in described.items():
            _check_key(key, name, where, self.base)
            try:
                self.dimensions[key] = _dimension(description, dict(setting_fields())[key].annotation is int)
            except ValueError as e:
                raise UserError(f"{where}: {key}: {e}") from None
        for key, dimension in self.dimensions.items():
            for value in dimension.extremes():
                try:
                    self._with({key: value})
                except UserError as e:
                    raise UserError(f"{where}: {key} would be {value}: {e}") from None

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions, by dotted key."""
        return {key: dimension.distribution for key, dimension in self.dimensions.items()}

    def config(self, params: Mapping[str, Any], **fixed: Any) -> Config:
        """The settings with a trial's sampled `params`. fixed: other settings, dotted keys with __ for the dot."""
        values = {key: self.dimensions[key].value(value) for key, value in params.items()}
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
            f"{where}: {key} cannot be searched: only settings of data. and encoder. change what the encoder learns"
        )
    if reason := NOT_SEARCHED.get(key):
        raise UserError(f"{where}: {key} cannot be searched: {reason}")
    owner, dot, leaf = rest.partition(".")
    if section == "encoder" and dot and owner != encoder_type:
        raise UserError(f"{where}: {key} has no effect, since encoder.encoder_type is {encoder_type}")
    if section == "encoder" and leaf == "learning_rate" and base["encoder"]["learning_rate"] is not None:
        raise UserError(
            f"{where}: encoder.learning_rate is set and overrides {key}, so {key} cannot be searched: set"
            " encoder.learning_rate to null"
        )


def _dimension(description: dict[str, Any], whole: bool) -> Dimension:
    """Raises ValueError with the text of the user's error. whole: the setting is an integer."""
    if unknown := sorted(description.keys() - set(KEYS)):
        raise ValueError(f"unknown {', '.join(unknown)}; allowed are {', '.join(KEYS)}")
    if "choices" in description:
        choices = description["choices"]
        if len(description) > 1 or not isinstance(choices, list) or not choices:
            raise ValueError("choices must be a list of values, and the only key")
        return Dimension(CategoricalDistribution([json.dumps(choice) for choice in choices]))
    low, high = (_number(description.get(end), end) for end in ("low", "high"))
    log, around = description.get("log", False), description.get("around")
    if not isinstance(log, bool):
        raise ValueError("log must be true or false")
    if not low < high:
        raise ValueError(f"low {low:g} is not below high {high:g}")
    if log and low <= 0:
        raise ValueError(f"a logarithmic range must be above 0, and low is {low:g}")
    if around is None and whole and low.is_integer() and high.is_integer():
        return Dimension(IntDistribution(int(low), int(high), log=log))
    return Dimension(FloatDistribution(low, high, log=log), None if around is None else _number(around, "around"))


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)  # YAML reads 1e-4 as text
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"low and high (and around) must be numbers, and {name} is {value!r}")
    return number
