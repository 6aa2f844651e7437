"""A contrastive peer of SimSiam: Chen et al., "A Simple Framework for Contrastive Learning", arXiv:2002.05709 (SimCLR).

Backbone, projector, views and optimizer are SimSiam's. There is no predictor, and the batch's other segments repel.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from simsiam_dali.data.shards import ShardSet
from simsiam_dali.models.encoder import LossFn, LossOutput
from simsiam_dali.models.losses import nt_xent
from simsiam_dali.models.view_encoder import ViewEncoder, ViewEncoderType


class Contrastive(ViewEncoder):
    """ResNet backbone and projector."""

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Views `(B, n_mels, T)`, normalised log-mel, to their projections `(B, projection_dim)`."""
        return tuple(self.projector(self.features(view)) for view in views)


class ContrastiveType(ViewEncoderType):
    """`encoder_type: contrastive`: augmented views, no labels."""

    is_contrastive = True
    sections: ClassVar[tuple[str, ...]] = ("simsiam", "contrastive")
    loss_type = "nt_xent"

    def create(self, pretrained: bool = True) -> Contrastive:
        """See the base class."""
        return Contrastive(self.config, pretrained)

    def create_loss_fn(self, shards: ShardSet, device: torch.device) -> LossFn:  # noqa: ARG002  (no labels)
        """See the base class."""
        has_loss = torch.ones((), dtype=torch.bool, device=device)
        temperature = self.config.encoder.contrastive.temperature

        def loss_fn(outputs: Any, segment: Tensor) -> LossOutput:  # noqa: ARG001
            return LossOutput(nt_xent(outputs, temperature), has_loss, outputs[0])

        return loss_fn
