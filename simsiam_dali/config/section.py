"""The base of every section of the config."""

import typing
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the low end {pair[0]:g} is above the high end {pair[1]:g}")
    return pair


class Section(BaseModel):
    """A part of the tree; unknown keys are errors, values are final."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ranges_ascend(self) -> typing.Self:
        for name, value in self:
            if name.endswith("_range"):
                try:
                    _ascending(value)
                except ValueError as e:
                    raise ValueError(f"{name}: {e}") from None
        return self
