"""Activation checkpointing: keep a residual block's input only, and compute the rest again in the backward pass.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174. The gradients are the same; a step
takes about a third longer.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

from simsiam_dali.common.errors import UserError


@contextlib.contextmanager
def _without_running_statistics(block: nn.Module) -> Iterator[None]:
    """The second forward pass normalises by the batch as the first did, and must not count the batch twice."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)


def _recomputed(block: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not (block.training and torch.is_grad_enabled()):
        return forward(x)

    if torch.compiler.is_compiling():  # a compiled backward pass does not repeat what changes a buffer
        return checkpoint(forward, x, use_reentrant=False)

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _without_running_statistics(block)

    return checkpoint(forward, x, use_reentrant=False, context_fn=contexts)


class RecomputedBasicBlock(BasicBlock):
    """torchvision's block, recomputed in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """See the module."""
        return _recomputed(self, super().forward, x)


class RecomputedBottleneck(Bottleneck):
    """torchvision's block, recomputed in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """See the module."""
        return _recomputed(self, super().forward, x)


RECOMPUTED: dict[type, type] = {BasicBlock: RecomputedBasicBlock, Bottleneck: RecomputedBottleneck}


def recompute_blocks(encoder: nn.Module) -> None:
    """Let the residual blocks of `encoder` be recomputed; parameters, buffers and their names stay as they are.

    Raises UserError where there are none.
    """
    blocks = [module for module in encoder.modules() if type(module) in RECOMPUTED]
    if not blocks:
        raise UserError("train.activation_checkpointing is for encoders with residual blocks, and this one has none")
    for block in blocks:
        block.__class__ = RECOMPUTED[type(block)]  # a copy of the encoder keeps it, as a changed `forward` would not
