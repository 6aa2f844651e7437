"""Batch norm over the batches of all ranks: torch's SyncBatchNorm on GPUs, our own on CPUs, which torch's refuses.

Parameters and buffers keep their names, so a checkpoint loads with and without it.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm of `(B, C, ...)` by mean and variance over all ranks, whose batches may differ in size."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype; evaluation mode normalises by the running statistics."""
        if not self.training:
            return super().forward(x)
        axes = [0, *range(2, x.ndim)]
        per_channel = [1, -1] + [1] * (x.ndim - 2)
        values = x.float()
        count = torch.tensor(x.numel() // x.shape[1])
        dist.all_reduce(count)
        number = int(count)
        mean = all_reduce(values.sum(axes)) / number
        centred = values - mean.view(per_channel)
        variance = all_reduce(centred.square().sum(axes)) / number
        self._update_running_statistics(mean.detach(), variance.detach(), number)
        y = centred * (variance + self.eps).rsqrt().view(per_channel)
        if self.affine:
            y = y * self.weight.view(per_channel) + self.bias.view(per_channel)
        return y.to(x.dtype)

    def _update_running_statistics(self, mean: Tensor, variance: Tensor, number: int) -> None:
        """With those of `number` values; the running variance is the unbiased one."""
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (number / (number - 1)), self.momentum)


def convert(encoder: nn.Module, device: torch.device) -> None:
    """Make the encoder's batch norms compute their statistics over all ranks, in place."""
    if device.type != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
        return
    for layer in encoder.modules():
        if isinstance(layer, _BatchNorm):
            layer.__class__ = CpuSyncBatchNorm  # same attributes, another forward
