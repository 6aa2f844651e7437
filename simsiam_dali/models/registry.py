"""The encoder types, one entry each: what an encoder is made of, fed with, and learns from.

A new type is a file in `models/`, and an entry of `ENCODERS` (see CONTRIBUTING.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.schema import Config, OptimizerConfig
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.models.encoder import Encoder
from simsiam_dali.models.labels import SongLabels
from simsiam_dali.models.losses import MetadataContrastiveLoss, SimSiamLoss
from simsiam_dali.models.simple import MIN_SAMPLES, SimpleAudioEncoder
from simsiam_dali.models.simsiam import SimSiam

if TYPE_CHECKING:  # an encoder alone can do without DALI
    from simsiam_dali.data.graph import LogMel


class Scored(NamedTuple):
    """What a loss function says of a batch; all on the device, so that nobody waits for it."""

    loss: Tensor  # float32 scalar
    counts: Tensor  # bool scalar; False where the batch held nothing to learn from, and `loss` is 0
    z: Tensor  # (B, output_dim): what the collapse gauges are read on


LossFn = Callable[[Any, Tensor], Scored]
"""From what the encoder's forward gave, and the batch's segments `(B,)` int64."""


@dataclass(frozen=True)
class EncoderType:
    """All that the trainer knows of a type."""

    create: Callable[[Config, bool], Encoder]
    """From the config; False = weights will come from a checkpoint, so read none."""
    create_loss_fn: Callable[[Config, ShardSet, torch.device], LossFn]
    batches: Literal["views", "raw"]
    """What the forward takes: two augmented views, or the waveform."""
    embeds: Literal["clean", "raw"]
    """What `embed` takes: a view without augmentation, or the waveform."""
    settings: Callable[[Config], OptimizerConfig]
    """The type's section of the config."""
    variant: Callable[[Config], str]
    """What tells two encoders of this type apart, in a word."""
    tags: Callable[[Config], dict[str, str]]
    """`loss_type`, and what else `mlflow.auto_tags` may name."""
    min_samples: int
    """The shortest input, in samples of the front end's rate."""
    warn_of_collapse: bool
    """Whether few directions in the outputs are a fault: SimSiam's loss is lowest there, a contrastive one is not."""
    compares: bool
    """Whether the loss compares a batch's segments with each other: then it is given those of all processes."""
    learns_from_tags: bool
    """Whether it is shown its training songs' artists or albums: then only other songs can tell what it has learned."""

    def input_shapes(self, log_mel: "LogMel", seconds: float) -> list[tuple[int, ...]]:
        """Shape of each of the forward's inputs, for one segment."""
        if self.batches == "views":
            return [(log_mel.n_mels, log_mel.frames(seconds))] * 2
        return [(round(seconds * log_mel.sample_rate),)]


def _create_simsiam(config: Config, pretrained: bool) -> SimSiam:
    simsiam = config.encoder.simsiam
    return SimSiam(
        backbone=simsiam.backbone,
        projection_dim=simsiam.projection_dim,
        projection_layers=simsiam.projection_layers,
        predictor_hidden_dim=simsiam.predictor_hidden_dim,
        pretrained=pretrained and simsiam.pretrained_backbone,
        embedding=simsiam.embedding,
        fix_predictor_lr=simsiam.fix_predictor_lr,
        width=simsiam.backbone_width,
        pooling=simsiam.pooling,
    )


def _simsiam_loss(config: Config, shards: ShardSet, device: torch.device) -> LossFn:  # noqa: ARG001  (no labels)
    loss_fn, counts = SimSiamLoss(), torch.ones((), dtype=torch.bool, device=device)

    def score(outputs: Any, segment: Tensor) -> Scored:  # noqa: ARG001
        p1, p2, z1, z2 = outputs
        return Scored(loss_fn(p1, p2, z1, z2), counts, z1)

    return score


def _create_simple(config: Config, pretrained: bool) -> SimpleAudioEncoder:  # noqa: ARG001  (there are no weights to be had)
    return SimpleAudioEncoder(config.encoder.embedding_dim, config.encoder.simple.base_channels)


def _metadata_loss(config: Config, shards: ShardSet, device: torch.device) -> LossFn:
    simple = config.encoder.simple
    loss_fn = MetadataContrastiveLoss(
        temperature=simple.contrastive_temperature,
        use_artist=simple.use_artist,
        use_album=simple.use_album,
        use_year=simple.use_year,
        year_threshold=simple.year_threshold,
    )
    labels = SongLabels.from_songs(shards.songs, shards.segments["song"].to_numpy()).to(device)

    def score(outputs: Any, segment: Tensor) -> Scored:
        if device.type == "cuda" and segment.device.type == "cpu":
            segment = segment.pin_memory()  # from there the host need not wait for the copy
        loss, anchors = loss_fn(outputs, *labels.of(segment.to(device, non_blocking=True)))
        return Scored(loss, anchors > 0, outputs)

    return score


ENCODERS: dict[str, EncoderType] = {
    "simsiam": EncoderType(
        create=_create_simsiam,
        create_loss_fn=_simsiam_loss,
        batches="views",
        embeds="clean",
        settings=lambda config: config.encoder.simsiam,
        variant=lambda config: config.encoder.simsiam.backbone,
        tags=lambda config: {
            "loss_type": "negative_cosine",
            "backbone": config.encoder.simsiam.backbone,
            "pretrained": str(bool(config.encoder.simsiam.pretrained_backbone)).lower(),
        },
        min_samples=1,
        warn_of_collapse=True,
        compares=False,
        learns_from_tags=False,
    ),
    "simple": EncoderType(
        create=_create_simple,
        create_loss_fn=_metadata_loss,
        batches="raw",
        embeds="raw",
        settings=lambda config: config.encoder.simple,
        variant=lambda config: f"cnn{config.encoder.simple.base_channels}",
        tags=lambda config: {"loss_type": config.encoder.simple.loss_type},
        min_samples=MIN_SAMPLES,
        warn_of_collapse=False,
        compares=True,
        learns_from_tags=True,
    ),
}


def encoder_type(config: Config) -> EncoderType:
    """The entry that `encoder.encoder_type` names. Raises UserError with the known names."""
    name = config.encoder.encoder_type
    if name not in ENCODERS:
        raise UserError(f"encoder.encoder_type is {name!r}, and the known ones are {', '.join(sorted(ENCODERS))}")
    return ENCODERS[name]
