"""Training objectives."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam_dali.config.schema import TagPairsConfig

UNKNOWN = -1  # an id or a year that is not known, and the padding of a row's ids


def simsiam_loss(p: Sequence[Tensor], z: Sequence[Tensor]) -> Tensor:
    """Symmetrised negative cosine similarity with stop-gradient (arXiv:2011.10566, equations 1 to 4).

    Predictions and projections of each view, `(B, D)`, any float dtype, to a float32 scalar in [-1, 1]. A view's
    prediction is compared with the mean projection of all other views, which is FastSiam's target (Pototzky et al.,
    GCPR 2022, section 3); of two views it is the other one's. Predictions without a projection, of short views, come
    last, and are compared with the mean of all projections. -1 is reached both by perfect predictions and by collapse:
    never choose a checkpoint by it.
    """
    losses = [negative_cosine(own, mean_of_others(z, view)) for view, own in enumerate(p)]
    return torch.stack(losses).mean()


def mean_of_others(z: Sequence[Tensor], view: int) -> Tensor:
    """The mean of all but one of the projections `(B, D)`."""
    others = [own.float() for own in (*z[:view], *z[view + 1 :])]
    return others[0] if len(others) == 1 else torch.stack(others).mean(dim=0)


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Mean over the batch of D(p, stopgrad(z)) = -cos(p, z); float32 also under autocast."""
    z = z.detach()  # the stop-gradient: without it the encoder collapses (section 4.1)
    return -F.cosine_similarity(p.float(), z.float(), dim=1).mean()


def nt_xent(z: Sequence[Tensor], temperature: float) -> Tensor:
    """SimCLR's loss: each projection is to be nearer to the segment's other views than to all others of the batch.

    Projections of each view, `(B, D)`, any float dtype, to a float32 scalar, also under autocast. Of two views it is
    arXiv:2002.05709, equation 1 and algorithm 1: the mean cross-entropy of the 2 B rows over the cosines with the
    2 B - 1 others. Of more, a row's is the mean over its other views (L_out of arXiv:2004.11362, equation 2).
    """
    views, rows = len(z), len(z[0])
    with torch.autocast(z[0].device.type, enabled=False):
        x = F.normalize(torch.cat(list(z)).float(), dim=1)
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
        log_share = (x @ x.T / temperature).masked_fill(itself, -torch.inf).log_softmax(dim=1)
        segment = torch.arange(rows, device=x.device).repeat(views)
        other_views = (segment[:, None] == segment) & ~itself
        # Not by indexing with the mask, for which the host would wait.
        return -log_share.masked_fill(~other_views, 0.0).sum() / (len(x) * (views - 1))


def rating_loss(predicted: Tensor, rating: Tensor) -> Tensor:
    """Mean squared error of ratings `(B,)`, any float dtype, to a float32 scalar. NaN is unrated, and counts nothing.

    Exactly 0 where nothing is rated.
    """
    rated = ~rating.isnan()
    error = (predicted.float() - rating.nan_to_num()).square() * rated
    return error.sum() / rated.sum().clamp(min=1)


class MetadataContrastiveLoss(nn.Module):
    """Multi-positive InfoNCE: songs that share an artist, an album, a time or a folder attract, all others repel.

    It is L_out of Khosla et al., "Supervised Contrastive Learning" (arXiv:2004.11362, equation 2), with positives by
    metadata in place of one class label: a row may have several artists and albums, and matching is not transitive.
    """

    def __init__(self, settings: TagPairsConfig) -> None:
        super().__init__()
        self.settings = settings

    def forward(
        self, embeddings: Tensor, artists: Tensor, albums: Tensor, years: Tensor, folders: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Embeddings `(B, D)`, any float dtype, and their labels (see `positives`) to the loss and its anchors.

        The loss is a float32 scalar (float64 for float64), also under autocast: the mean over the anchors, which are
        the rows with a positive. Their number is an int64 scalar; without any, the loss and its gradient are exactly 0.
        Nothing here makes the host wait for the device.
        """
        positives = self.positives(artists, albums, years, folders)
        with torch.autocast(embeddings.device.type, enabled=False):
            z = F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=1)
            logits = z @ z.T / self.settings.contrastive_temperature
            itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
            # Not -inf: a row that is alone in its batch would turn it into NaN.
            others = logits.masked_fill(itself, torch.finfo(z.dtype).min)
            count = positives.sum(dim=1)
            mean_positive = (logits * positives).sum(dim=1) / count.clamp(min=1)
            has_positive = count > 0
            anchors = has_positive.sum()
            each = (others.logsumexp(dim=1) - mean_positive) * has_positive
            return each.sum() / anchors.clamp(min=1), anchors

    def positives(self, artists: Tensor, albums: Tensor, years: Tensor, folders: Tensor) -> Tensor:
        """Which rows attract each other: bool `(B, B)`, symmetric, False on the diagonal.

        artists: ids `(B, A)`; albums: ids `(B, K)`; years `(B,)`; folders: ids `(B, F)`; all int64, `UNKNOWN` where not
        known or padded. Two rows match by a common artist, album or folder or years close enough, whichever are
        switched on. What is unknown matches nothing, not even what is unknown too.
        """
        match = torch.zeros(len(years), len(years), dtype=torch.bool, device=years.device)
        if self.settings.use_artist:
            match |= _share_an_id(artists)
        if self.settings.use_album:
            match |= _share_an_id(albums)
        if self.settings.use_folder:
            match |= _share_an_id(folders)
        if self.settings.use_year:
            known = years != UNKNOWN
            match |= ((years[:, None] - years).abs() <= self.settings.year_threshold) & known[:, None] & known
        return match.fill_diagonal_(False)


def _share_an_id(ids: Tensor) -> Tensor:
    """Ids `(B, K)` to whether two rows have a known one in common, `(B, B)`.

    Column by column, so that B x B x K booleans are held at a time and not K times as many: 8 MiB for 1,024 rows of 8.
    """
    others = ids.masked_fill(ids == UNKNOWN, UNKNOWN - 1)  # so that unknown equals nothing
    shared = torch.zeros(len(ids), len(ids), dtype=torch.bool, device=ids.device)
    for column in ids.T:
        shared |= (column[:, None, None] == others).any(dim=2)
    return shared
