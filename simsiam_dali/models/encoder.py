"""What the trainer asks of an encoder, whichever type it is."""

from abc import abstractmethod
from typing import Any

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
