"""A peer of SimSiam with a momentum target: Grill et al., "Bootstrap Your Own Latent", arXiv:2006.07733 (BYOL).

Backbone, projector, predictor, views and optimizer are SimSiam's. The predictions are compared with the projections of
a target network, whose weights are an exponential moving average of the encoder's (section 3.1, equation 1).
"""

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn

from simsiam_dali.config.schema import Config
from simsiam_dali.models.simsiam import SimSiam, SimSiamType


class Byol(SimSiam):
    """SimSiam's networks, and the target: a second backbone and projector that no gradient reaches.

    The momentum is constant (table 5a); the paper's schedule raises it to 1 over the training.
    """

    def __init__(self, config: Config, pretrained: bool = True) -> None:
        super().__init__(config, pretrained)
        self.momentum = config.encoder.byol.momentum
        self.target = nn.ModuleDict({"backbone": self.backbone, "projector": self.projector})
        self.target = copy.deepcopy(self.target).requires_grad_(False)

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Views `(B, n_mels, T)` to the prediction of each and the target's projection of each, `(B, projection_dim)`.

        The target's batch norm takes its statistics from the batch too, as in the published code. Short views, which
        come last, have a prediction only.
        """
        p = self.predict([self.projector(self.features(view)) for view in views])
        with torch.no_grad():
            long = [view.unsqueeze(1) for view in views[: len(views) - self.short_views]]
            z = [self.target["projector"](self.target["backbone"](view)) for view in long]
        return *p, *z

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the target's weights towards the encoder's; its running statistics are its own."""
        for name in self.target:
            pairs = zip(self.target[name].parameters(), getattr(self, name).parameters(), strict=True)
            for target, own in pairs:
                target.lerp_(own, 1 - self.momentum)


class ByolType(SimSiamType):
    """`encoder_type: byol`: augmented views, no labels, SimSiam's loss against the target."""

    sections: ClassVar[tuple[str, ...]] = ("simsiam", "byol")

    def create(self, pretrained: bool = True) -> Byol:
        """See the base class."""
        return Byol(self.config, pretrained)
