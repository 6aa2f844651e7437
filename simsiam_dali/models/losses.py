"""Training objectives."""

import torch.nn.functional as F
from torch import Tensor, nn


class SimSiamLoss(nn.Module):
    """Symmetrised negative cosine similarity with stop-gradient (arXiv:2011.10566, equations 1 to 4)."""

    def forward(self, p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
        """Predictions and projections `(B, D)`, any float dtype, to a float32 scalar in [-1, 1].

        -1 is reached both by perfect predictions and by collapse: never choose a checkpoint by it.
        """
        return (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Mean over the batch of D(p, stopgrad(z)) = -cos(p, z); float32 also under autocast."""
    z = z.detach()  # the stop-gradient: without it the encoder collapses (section 4.1)
    return -F.cosine_similarity(p.float(), z.float(), dim=1).mean()
