"""What the trainer asks of an encoder, whichever type it is."""

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """A module whose `forward` gives what its loss takes, and whose `embed` gives what a song is known by."""

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """One batch of clean input to its embeddings `(B, embedding_dim)`, not normalised."""

    @property
    @abstractmethod
    def embedding_dim(self) -> int:
        """Width of what `embed` returns."""

    @property
    @abstractmethod
    def output_dim(self) -> int:
        """Width of what the loss compares, on which the collapse gauges are read."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups; `fix_lr` marks those whose learning rate is not decayed."""
        return [{"params": list(self.parameters()), "fix_lr": False}]


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
