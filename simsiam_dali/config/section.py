"""The base of every section of the config."""

import typing
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the tree; unknown keys are errors, values are final."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ranges_ascend(self) -> typing.Self:
        for name, value in self:
            if name.endswith("_range") and value[0] > value[1]:
                raise ValueError(f"{name}: the low end {value[0]:g} is above the high end {value[1]:g}")
        return self
