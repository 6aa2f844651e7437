"""Does the encoder learn? Collapse gauges and kNN scores, since SimSiam's loss is lowest at collapse.

Everything here is torch on the device of its inputs, to be called outside autocast. Embeddings are compared
by cosine and not standardised first, so that a score is of what `embed` gives, whatever other songs are there.

A kNN score takes a bank (training songs) and queries (validation songs), one row a song; the caller sees
to it that no song is in both. It is NaN where nothing can be scored, and is to be read beside its chance level.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

UNKNOWN_LABEL = -1
# A neighbour's vote weighs exp(cosine / temperature): Wu et al. 2018, arXiv:1805.01978, section 3.4.
VOTE_TEMPERATURE = 0.07
# The share of the healthy 1/sqrt(d) below which the projections count as collapsed to a point.
LOW_STD = 0.5
# A ResNet-18 on 48 synthetic songs, 16 a batch, without the stop-gradient: the effective rank fell from 14 to
# below 5 within 100 steps while z-std stayed healthy (batch norm sees to that); with it, never below 10.
LOW_RANK = 5.0
# The share of batches without a positive pair above which the user hears of it.
MOST_BATCHES = 0.5
# Bounds how many similarities are held at a time: 512 queries on a bank of 100,000 songs are 200 MB.
QUERIES_AT_ONCE = 512


def z_std(z: Tensor) -> Tensor:
    """Std over the batch of the L2-normalised projections `(B, d)`, mean over d: a scalar.

    About 1/sqrt(d) when healthy, 0 when all rows are one point (arXiv:2011.10566, section 4.1). B at least 2.
    Take z from training steps: evaluation mode lowers it while running batch-norm statistics settle.
    """
    return F.normalize(z.float(), dim=1).std(dim=0).mean()


def effective_rank(z: Tensor) -> Tensor:
    """How many directions the rows of `(B, d)` really use: a scalar between 1 and min(B - 1, d).

    exp of the entropy of the singular values' shares (Roy & Vetterli 2007, "The effective rank"), here of the
    matrix with its column means taken off, so that an offset common to all rows is no direction. It sees the
    collapse to a few dimensions that `z_std` misses. Give 16 rows or more, or it is low for want of rows.
    NaN when z is not finite.
    """
    if not z.isfinite().all():
        return z.new_tensor(math.nan)
    z = z.float()
    values = torch.linalg.svdvals(z - z.mean(dim=0))
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum().exp()


def collapse_advice(z_std: float, d: int, effective_rank: float) -> str | None:
    """What to tell the user about projections of width `d` with these gauges; None when they look healthy."""
    if math.isnan(z_std) or math.isnan(effective_rank):
        return "diverged: the projections are not finite; lower learning_rate, or add a warm-up"
    healthy = 1 / math.sqrt(d)
    advice = (
        "a lower learning_rate, a warm-up or a larger batch_size may help; "
        "see that fix_predictor_lr is true and that the augmentations are on"
    )
    if z_std < LOW_STD * healthy:
        return f"collapse: z-std is {z_std:.2g}, and about {healthy:.2g} is healthy; {advice}"
    if effective_rank < LOW_RANK:
        return f"collapse: the projections vary in {effective_rank:.1f} directions (effective rank); {advice}"
    return None


def pairless_advice(share: float) -> str | None:
    """What to tell the user when this share of an epoch's batches had no positive pair; None up to a half."""
    if share <= MOST_BATCHES:
        return None
    return (
        f"{share:.0%} of the batches held no two segments with an artist, album or year in common, so the encoder"
        " learned from the others only: use a larger --batch-size, or complete the tags"
    )


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


def knn_labels(bank: Tensor, bank_labels: Tensor, query: Tensor, query_labels: Tensor, k: int) -> float:
    """Accuracy of the k nearest neighbours' vote, weighted by similarity.

    `bank` `(N, D)`, `query` `(Q, D)`, float; labels `(N,)` and `(Q,)`, int64, one a song. Rows with
    `UNKNOWN_LABEL` are left out, and so are queries whose label no song of the bank has: no vote could be
    right. Of labels with equal votes the one with the nearest song wins; of equally near songs, the first.
    """
    known = bank_labels != UNKNOWN_LABEL
    bank, bank_labels = bank[known], bank_labels[known]
    scored = torch.isin(query_labels, bank_labels)
    if not scored.any():
        return math.nan
    similarity, neighbour = _nearest(bank, query[scored], k)
    labels = bank_labels[neighbour]
    weight = torch.exp(similarity / VOTE_TEMPERATURE)
    same = labels[:, :, None] == labels[:, None, :]
    votes = (same * weight[:, None, :]).sum(dim=2)  # (Q, k): all that is cast for each neighbour's label
    winner = votes.argmax(dim=1, keepdim=True)
    predicted = labels.gather(1, winner).squeeze(1)
    return (predicted == query_labels[scored]).float().mean().item()


def label_chance(bank_labels: Tensor, query_labels: Tensor) -> tuple[float, float]:
    """Accuracy, on the queries that `knn_labels` scores, of two guesses that hear nothing.

    The bank's commonest label each time, and labels drawn at the bank's frequencies (expected accuracy).
    """
    known = bank_labels[bank_labels != UNKNOWN_LABEL]
    scored = query_labels[torch.isin(query_labels, known)]
    if len(scored) == 0:
        return math.nan, math.nan
    labels, count = torch.unique(known, return_counts=True)
    majority = (scored == labels[count.argmax()]).float().mean()
    drawn = (count / len(known))[torch.searchsorted(labels, scored)].mean()
    return majority.item(), drawn.item()


def knn_rating(bank: Tensor, bank_ratings: Tensor, query: Tensor, query_ratings: Tensor, k: int) -> tuple[float, float]:
    """Mean absolute error and Pearson correlation of the k nearest neighbours' mean rating.

    `bank` `(N, D)`, `query` `(Q, D)`; ratings `(N,)` and `(Q,)`, float, 0 to 1, NaN = unrated and left out.
    The correlation is NaN where the ratings or the predictions are all equal.
    """
    rated = ~bank_ratings.isnan()
    bank, bank_ratings = bank[rated], bank_ratings[rated]
    scored = ~query_ratings.isnan()
    if not scored.any() or len(bank) == 0:
        return math.nan, math.nan
    truth = query_ratings[scored].double()
    predicted = bank_ratings[_nearest(bank, query[scored], k)[1]].double().mean(dim=1)
    error = (predicted - truth).abs().mean().item()
    # With k as large as the bank all predictions are one mean, up to rounding: that has no correlation.
    if min(truth.std(correction=0), predicted.std(correction=0)) < 1e-9:
        return error, math.nan
    return error, torch.corrcoef(torch.stack([predicted, truth]))[0, 1].item()


def rating_chance(bank_ratings: Tensor, query_ratings: Tensor) -> float:
    """Mean absolute error of predicting the bank's mean rating for every rated query."""
    return (query_ratings - bank_ratings.nanmean()).abs().nanmean().item()


def _nearest(bank: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine and bank row of each query's nearest songs, nearest first, both `(Q, min(k, N))`."""
    bank, query = F.normalize(bank.float(), dim=1), F.normalize(query.float(), dim=1)
    similarities, rows = [], []
    for part in query.split(QUERIES_AT_ONCE):
        # a stable sort, since topk leaves the order of equals to chance
        similarity, row = torch.sort(part @ bank.T, dim=1, descending=True, stable=True)
        similarities.append(similarity[:, :k].clone())  # a slice alone would keep the whole row in memory
        rows.append(row[:, :k].clone())
    return torch.cat(similarities), torch.cat(rows)
