"""The encoder types by name. A new type is a file in `models/` and an entry here (see CONTRIBUTING.md)."""

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.schema import Config
from simsiam_dali.models.byol import ByolType
from simsiam_dali.models.contrastive import ContrastiveType
from simsiam_dali.models.encoder import EncoderType
from simsiam_dali.models.joint import JointType
from simsiam_dali.models.simple import SimpleType
from simsiam_dali.models.simsiam import SimSiamType

ENCODERS: dict[str, type[EncoderType]] = {
    "simsiam": SimSiamType,
    "simple": SimpleType,
    "joint": JointType,
    "contrastive": ContrastiveType,
    "byol": ByolType,
}


def encoder_type(config: Config) -> EncoderType:
    """The type that `encoder.encoder_type` names. Raises UserError with the known names."""
    name = config.encoder.encoder_type
    if name not in ENCODERS:
        raise UserError(f"encoder.encoder_type is {name!r}; the known types are {', '.join(sorted(ENCODERS))}")
    return ENCODERS[name](config)


def reads_setting(name: str, key: str) -> bool:
    """Whether encoders of the type `name` read a setting of `data.` or `encoder.`, by its dotted key.

    True where that is not known: of a type that is not registered here, or that names no `sections`.
    """
    kind = ENCODERS.get(name)
    return kind is None or not kind.sections or kind.reads(key)
