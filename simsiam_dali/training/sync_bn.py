"""Batch norm by the statistics of all ranks' batches: torch's own on GPUs, and one for CPUs, which torch's refuses.

Weights and buffers keep their names, so that a checkpoint fits with and without it.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simsiam_dali.common.distributed import sum_over_ranks


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm of `(B, C, ...)` by mean and variance over all ranks, whose batches may differ in size."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype, normalised; by the running statistics in evaluation mode."""
        if not self.training:
            return super().forward(x)
        axes = [0, *range(2, x.ndim)]
        each = [1, -1] + [1] * (x.ndim - 2)  # one number a channel, as the input's shape has it
        values = x.float()
        count = torch.tensor(x.numel() // x.shape[1])
        dist.all_reduce(count)
        number = int(count)
        mean = sum_over_ranks(values.sum(axes)) / number
        centred = values - mean.view(each)
        variance = sum_over_ranks(centred.square().sum(axes)) / number
        self._remember(mean.detach(), variance.detach(), number)
        y = centred * (variance + self.eps).rsqrt().view(each)
        if self.affine:
            y = y * self.weight.view(each) + self.bias.view(each)
        return y.to(x.dtype)

    def _remember(self, mean: Tensor, variance: Tensor, number: int) -> None:
        """Move the running statistics towards those of `number` values; their variance is the unbiased one."""
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (number / (number - 1)), self.momentum)


def convert(encoder: nn.Module, device: torch.device) -> None:
    """Let the encoder's batch norms, which keep their weights and buffers, work over all ranks on `device`."""
    if device.type != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
        return
    for layer in encoder.modules():
        if isinstance(layer, _BatchNorm):
            layer.__class__ = CpuSyncBatchNorm  # the same attributes, another forward
