"""Collapse gauges: SimSiam's loss is lowest at collapse, so the loss cannot tell.

z_std sees a collapse to a point; effective_rank that to one or two directions, which batch norm hides from z_std.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The share of the healthy 1/sqrt(d) below which the projections count as collapsed to a point.
LOW_STD = 0.5
LOW_RANK = 2.3
"""The effective rank below which the projections count as collapsed to one or two directions.

Measured with SimSiam (ResNet-18 of width 16, 512 projections, batches of 64) on 526 to 1,508 segments of real music. Of
1,024 clean views in training mode: 44 untrained; trained 8.8, 8.6 and 7.4 by one recipe, 9.4 with four views, 4.6 with
short views, 4.6 with resized crops, 4.4 with mixup. While two of these trained, on 1,024 augmented views, never below
3.1 (the one with short views) and 4.7 (the recipe); on the demo library, never below 4.7. Without the stop-gradient:
2.1 after 23 steps and 1.0 after 46, with z-std still above `LOW_STD`. Normal rows with all but 5% of their variance in
one direction have 1.7. So a collapse to three directions is not told apart from a healthy training.
"""
LEAST_ROWS = 64
"""Rows below which a low effective rank means nothing, such as after a run was resumed at the end of an epoch.

In the same healthy trainings 64 rows had 2.9 or more, and 16 rows at times 2.2.
"""
# The share of batches without a positive pair above which the user hears of it.
MOST_BATCHES = 0.5


def z_std(z: Tensor) -> Tensor:
    """Std over the batch of the L2-normalised projections `(B, d)`, mean over d: a scalar.

    About 1/sqrt(d) when healthy, 0 when all rows are one point (arXiv:2011.10566, section 4.1). B at least 2.
    Take z from training steps: evaluation mode lowers it while running batch-norm statistics settle.
    """
    return F.normalize(z.float(), dim=1).std(dim=0).mean()


def effective_rank(z: Tensor) -> Tensor:
    """The number of directions over which the rows of `(B, d)` vary: a scalar between 1 and min(B - 1, d).

    exp of the entropy of the directions' shares of the variance: the squared singular values of the matrix with its
    column means taken off, so that an offset common to all rows is no direction. Roy & Vetterli 2007, "The effective
    rank", take the shares of the singular values themselves. Those give a little noise in each of many directions too
    much weight: one direction and 1% of the variance spread over 511 others would count as 124 directions, by variance
    as 1.1. It sees the collapse to one or two directions that `z_std` misses. Give `LEAST_ROWS` or more, or it is low
    for want of rows. NaN when z is not finite.
    """
    if not z.isfinite().all():
        return z.new_tensor(math.nan)
    z = z.float()
    variances = torch.linalg.svdvals(z - z.mean(dim=0)).square()
    shares = variances / variances.sum().clamp_min(torch.finfo(variances.dtype).tiny)
    return torch.special.entr(shares).sum().exp()


def collapse_advice(z_std: float, d: int, effective_rank: float, rows: int) -> str | None:
    """Advice for `rows` projections of width `d` with these gauges; None when they look healthy."""
    if math.isnan(z_std) or math.isnan(effective_rank):
        return "diverged: the projections are not finite; lower learning_rate, or add a warm-up"
    healthy = 1 / math.sqrt(d)
    advice = (
        "a lower learning_rate, a warm-up or a larger batch_size may help; "
        "see that fix_predictor_lr is true and that the augmentations are on"
    )
    if z_std < LOW_STD * healthy:
        return f"collapse: z-std is {z_std:.2g}, and about {healthy:.2g} is healthy; {advice}"
    if effective_rank < LOW_RANK and rows >= LEAST_ROWS:
        return f"collapse: the projections vary in about {effective_rank:.1f} directions (effective rank); {advice}"
    return None


def no_positives_advice(share: float) -> str | None:
    """Advice when this share of an epoch's batches had no positive pair; None up to a half."""
    if share <= MOST_BATCHES:
        return None
    return (
        f"{share:.0%} of the batches had no positive pair (no two segments with a tag in common), so the encoder"
        " learned by tags from the others only: use a larger --batch-size, or complete the tags"
    )
