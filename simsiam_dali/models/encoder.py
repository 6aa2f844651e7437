"""The interface between the trainer and an encoder type: the module, its loss and its properties."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam_dali.config.schema import Config, OptimizerConfig
from simsiam_dali.data.shards import ShardSet

if TYPE_CHECKING:  # an encoder alone needs no DALI
    from simsiam_dali.data.graph import LogMel


class Encoder(nn.Module):
    """A module whose `forward` returns the inputs of its loss, and whose `embed` returns embeddings."""

    embedding_dim: int
    """Width of what `embed` returns."""
    output_dim: int
    """Width of what the loss compares, on which the collapse gauges are read."""

    def embed(self, x: Tensor) -> Tensor:
        """One batch of clean input to its embeddings `(B, embedding_dim)`, not normalised."""
        raise NotImplementedError

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups; `fix_lr` marks those whose learning rate is not decayed."""
        return [{"params": list(self.parameters()), "fix_lr": False}]

    def after_step(self) -> None:
        """Called after each step of the optimizer, on all ranks, whose weights are equal."""


class LossOutput(NamedTuple):
    """The loss of a batch. All tensors stay on the device, so that the host does not wait for it."""

    loss: Tensor  # float32 scalar
    has_loss: Tensor  # bool scalar; False where the batch held nothing to learn from, and `loss` is 0
    z: Tensor  # (B, output_dim), on which the collapse gauges are computed


LossFn = Callable[[Any, Tensor], LossOutput]
"""From the output of the encoder's forward, and the batch's rows of the segment table `(B,)` int64.

It is called outside autocast, but gets what the encoder returned under it: 16-bit floats, which it takes `.float()`.
"""


VIEW_SETTINGS = ("data.views", "data.view_crops", "data.short_views", "data.short_view_seconds")
"""Settings that only types on views read."""


class EncoderType(ABC):
    """All that the trainer knows of an encoder type, for one config."""

    batches: ClassVar[Literal["views", "raw"]]
    """Input of the forward: `data.views` augmented views and then `data.short_views` short ones, or the waveform."""
    embeds: ClassVar[Literal["clean", "raw"]]
    """Input of `embed`: one view without augmentation, or the waveform."""
    min_samples: ClassVar[int] = 1
    """The shortest input, in samples at the front end's rate."""
    warn_of_collapse: bool = False
    """Whether few directions in the outputs are a fault: SimSiam's loss is lowest there, a contrastive one is not."""
    is_contrastive: ClassVar[bool] = False
    """Whether the loss compares the segments of a batch: then it is computed on the batches of all processes."""
    learns_from_tags: ClassVar[bool] = False
    """Whether it learns from artists, albums or ratings: then only songs not trained on can show what it learned."""

    outputs: ClassVar[tuple[str, ...]] = ("embedding",)
    """What `embed` can return; with several, `settings.embedding` is one of them."""
    sections: ClassVar[tuple[str, ...]] = ()
    """The sections of `encoder.` in the config that it reads."""

    settings: OptimizerConfig
    """The type's section of the config."""
    variant: str
    """One word that tells two encoders of this type apart."""
    tags: dict[str, str]
    """`loss_type`, and any other tags that `mlflow.auto_tags` may name."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @classmethod
    def reads(cls, key: str) -> bool:
        """Whether the type reads a setting of `data.` or `encoder.`, by its dotted key; of `sections` it reads all."""
        if key in VIEW_SETTINGS:
            return cls.batches == "views"
        if key == "encoder.final_training_epochs":  # hpo's, which trains for them as encoder.epochs
            return False
        sections = key.split(".")[1:-1]
        return not sections or sections[0] in cls.sections

    @abstractmethod
    def create(self, pretrained: bool = True) -> Encoder:
        """The encoder, on the CPU. pretrained: False where the weights will come from a checkpoint."""

    @abstractmethod
    def create_loss_fn(self, shards: ShardSet, device: torch.device) -> LossFn:
        """The loss; `shards` has the tags it may learn from."""

    def input_shapes(self, log_mel: "LogMel", seconds: float) -> list[tuple[int, ...]]:
        """Shape of each input of the forward, for one segment."""
        if self.batches == "views":
            data = self.config.data
            lengths = [seconds] * data.views + [data.short_view_seconds] * data.short_views
            return [(log_mel.n_mels, log_mel.frames(each)) for each in lengths]
        return [(round(seconds * log_mel.sample_rate),)]


def rows_on(device: torch.device, segment: Tensor) -> Tensor:
    """A batch's rows of the segment table `(B,)` on `device`; pinned first, so that the host does not wait."""
    if device.type == "cuda" and segment.device.type == "cpu":
        segment = segment.pin_memory()
    return segment.to(device, non_blocking=True)


def song_embeddings(embeddings: Tensor, songs: Tensor) -> tuple[Tensor, Tensor]:
    """Segments `(N, D)` and the song of each `(N,)` to songs `(S,)`, ascending, and embeddings `(S, D)`.

    The float32 mean of a song's L2-normalised segment embeddings, so that each segment counts the same.
    """
    return song_means(F.normalize(embeddings.float(), dim=1), songs)


def song_means(vectors: Tensor, songs: Tensor) -> tuple[Tensor, Tensor]:
    """The same for vectors as they are: the mean over a song's segments."""
    unique, row, count = torch.unique(songs, return_inverse=True, return_counts=True)
    sums = vectors.new_zeros(len(unique), vectors.shape[1]).index_add_(0, row, vectors)
    return unique, sums / count[:, None]
