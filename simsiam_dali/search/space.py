"""The search space: the settings of `hpo.space`, each with its distribution, checked before the first trial.

A range setting (a pair, such as pitch_shift_range) is searched by one number, half its width about the center `around`:
the strength of an augmentation, in one dimension.
"""

import copy
import functools
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import Field, ValidationError

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import Config, setting_fields
from simsiam_dali.config.section import Section
from simsiam_dali.models.registry import encoder_type

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


class Range(Section):
    """A description in `hpo.space` of numbers."""

    low: float
    high: float
    log: bool = False
    around: float | None = None


class Choices(Section):
    """A description in `hpo.space` of values of any type."""

    choices: list[Any] = Field(min_length=1)


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
        """The lowest and the highest sample, or all choices."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return list(d.choices)
        assert isinstance(d, IntDistribution | FloatDistribution)
        return [d.low, d.high]


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
        annotations = {key: field.annotation for key, field in setting_fields()}
        self.dimensions: dict[str, Dimension] = {}
        for key, description in described.items():
            if reason := _why_not_searched(key, config):
                raise UserError(f"{where}: {key} {reason}")
            try:
                dimension = _dimension(description, annotations.get(key) is int)
            except ValidationError as e:
                errors = "; ".join(f"{error['loc'][0]}: {error['msg']}" for error in e.errors())
                raise UserError(f"{where}: {key}: {errors}") from None
            except ValueError as e:  # Optuna's, about the range
                raise UserError(f"{where}: {key}: {e}") from None
            for sampled in dimension.extremes():
                try:
                    load_config(base=self.base, assignments=[f"{key}={json.dumps(dimension.value(sampled))}"])
                except UserError as e:
                    raise UserError(f"{where}: {str(e).partition(': ')[2]}") from None  # without --set and the value
            self.dimensions[key] = dimension
        self.distributions = {key: dimension.distribution for key, dimension in self.dimensions.items()}

    def config(self, params: Mapping[str, Any], **fixed: Any) -> Config:
        """The settings with a trial's sampled `params`. fixed: other settings, dotted keys with __ for the dot."""
        tree = copy.deepcopy(self.base)
        values = {key: self.dimensions[key].value(value) for key, value in params.items()}
        values |= {key.replace("__", "."): value for key, value in fixed.items()}
        for key, value in values.items():
            *path, leaf = key.split(".")
            functools.reduce(operator.getitem, path, tree)[leaf] = value
        return load_config(base=tree)


def _why_not_searched(key: str, config: Config) -> str | None:
    section, _, rest = key.partition(".")
    leaf = rest.partition(".")[2]
    if section not in ("data", "encoder"):
        return "cannot be searched: only settings of data. and encoder. change what the encoder learns"
    if key in NOT_SEARCHED:
        return f"cannot be searched: {NOT_SEARCHED[key]}"
    if not encoder_type(config).reads(key):
        return f"has no effect, since encoder.encoder_type is {config.encoder.encoder_type}"
    if section == "encoder" and leaf == "learning_rate" and config.encoder.learning_rate is not None:
        return "cannot be searched: encoder.learning_rate is set and overrides it; set encoder.learning_rate to null"
    return None


def _dimension(description: dict[str, Any], whole: bool) -> Dimension:
    """whole: the setting is an integer. Raises ValidationError, or Optuna's ValueError."""
    if "choices" in description:
        choices = Choices.model_validate(description).choices
        return Dimension(CategoricalDistribution([json.dumps(choice) for choice in choices]))
    ends = Range.model_validate(description)
    if whole and ends.around is None and ends.low.is_integer() and ends.high.is_integer():
        return Dimension(IntDistribution(int(ends.low), int(ends.high), ends.log))
    return Dimension(FloatDistribution(ends.low, ends.high, ends.log), ends.around)
