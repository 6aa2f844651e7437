"""What one rank of a torchrun does for test_ranks.py: the same global batch, shared among however many ranks there are.

python -m torch.distributed.run --standalone --nproc-per-node N tests/helpers/rank_worker.py SHARDS OUT
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from simsiam_dali.common.distributed import World, count_of_each_rank, process_group, rows_of_all_ranks
from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import Config
from simsiam_dali.data.loader import Batch
from simsiam_dali.data.shards import ShardSet, open_shards
from simsiam_dali.training.data import create_loader, log_mel_settings
from simsiam_dali.training.learner import Learner

SEGMENTS = 8  # of the global batch
EPOCHS = 3
CASES = {name: (name, True) for name in ("simsiam", "simple", "contrastive", "joint", "byol")} | {
    "apart": ("simsiam", False)
}
"""Encoder type, and whether batch norm is over all ranks."""


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm of `(B, C, ...)` by mean and variance over all ranks, whose batches may differ in size.

    torch's SyncBatchNorm refuses CPUs. With this, several processes compute what one does on their batches together.
    """

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


def synchronise_batch_norm(encoder: nn.Module) -> None:
    """Make the encoder's batch norms compute their statistics over all ranks, in place."""
    for layer in encoder.modules():
        if isinstance(layer, _BatchNorm):
            layer.__class__ = CpuSyncBatchNorm  # same attributes, another forward


def settings(encoder: str, ranks: int) -> Config:
    """A small encoder whose batch norms all come into play."""
    sets = [
        f"encoder.encoder_type={encoder}",
        f"encoder.batch_size={SEGMENTS // ranks}",
        "encoder.embedding_dim=16",
        "encoder.simple.base_channels=4",
        "encoder.simsiam.backbone=resnet18",
        "encoder.simsiam.projection_dim=32",
        "encoder.simsiam.predictor_hidden_dim=8",
        "encoder.simsiam.n_mels=16",
        "encoder.simsiam.augmentation.time_mask_param=10",
        "data.view_seconds=1.5",
        "data.threads=1",
        "data.shuffle_buffer=4",
    ]
    return load_config(assignments=sets)


def global_batch(encoder: str) -> Batch:
    """The same on every rank, whatever their number."""
    draw = torch.Generator().manual_seed(1)
    segment = torch.arange(SEGMENTS)
    if encoder == "simple":
        return Batch((torch.randn(SEGMENTS, 16000, generator=draw),), segment)
    return Batch(tuple(torch.randn(SEGMENTS, 16, 47, generator=draw) for _ in range(2)), segment)


def step(encoder: str, sync_bn: bool, shards: ShardSet, w: World) -> dict[str, Any]:
    """One training step of the real learner on this rank's rows: its loss, gradients and buffers."""
    learner = Learner(settings(encoder, w.size), shards, w)
    if sync_bn and w.size > 1:
        synchronise_batch_norm(learner.encoder)
    for name, parameter in learner.encoder.named_parameters():
        if name.endswith("weight") and not parameter.any():  # a residual branch that is still switched off
            torch.nn.init.constant_(parameter, 0.5)
    batch, each = global_batch(encoder), SEGMENTS // w.size
    own = slice(w.rank * each, (w.rank + 1) * each)
    mine = Batch(tuple(x[own] for x in batch.inputs), batch.segment[own])
    losses = w.gather(float(learner.step([mine], 0.1, 0.1).loss))
    return {
        "loss": sum(losses) / len(losses),
        "gradients": {name: gradient(p) for name, p in learner.encoder.named_parameters() if p.requires_grad},
        "state": learner.encoder.state_dict(),
    }


def gradient(parameter: Tensor) -> Tensor:
    """A copy of it; there must be one."""
    assert parameter.grad is not None
    return parameter.grad.clone()


def statistics(shards: ShardSet, w: World) -> dict[str, Any]:
    """Batch norm's statistics of each rank after a step, and when they are the main rank's."""
    learner = Learner(settings("simsiam", w.size), shards, w)
    batch = global_batch("simsiam")
    learner.step([Batch(tuple(x + w.rank for x in batch.inputs), batch.segment)], 0.1, 0.1)
    name = next(name for name in learner.encoder.state_dict() if name.endswith("running_mean"))
    before = w.gather(learner.encoder.state_dict()[name].clone())
    learner.share_statistics()
    return {"before": before, "shared": w.gather(learner.encoder.state_dict()[name].clone())}


def segments(shards: ShardSet, w: World) -> list[list[int]]:
    """The segments that this rank's training loader gives in each of its epochs."""
    c = settings("simsiam", w.size)
    loader = create_loader(c, shards, log_mel_settings(c), w, "train", "views", shuffled=True)
    return [[row for batch in loader for row in batch.segment.tolist()] for _ in range(EPOCHS)]


def uneven(w: World) -> dict[str, Any]:
    """Ranks whose batches differ in size: what all have together, the gradient of a weighted sum, batch norm of it."""
    mine = torch.arange(100 * w.rank, 100 * w.rank + w.rank + 2, dtype=torch.float32).unsqueeze(1).requires_grad_()
    rows = rows_of_all_ranks(mine, count_of_each_rank(len(mine)))
    weights = torch.arange(len(rows), dtype=torch.float32).unsqueeze(1)
    (rows * weights).sum().backward()
    assert mine.grad is not None
    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(1, affine=False))
    if w.size > 1:
        synchronise_batch_norm(norm)
    normalised = norm(mine.detach())
    return {
        "rows": rows.detach(),
        "gradients": w.gather(mine.grad.flatten().tolist()),
        "normalised": w.gather(normalised.flatten().tolist()),
        "running_var": norm[0].running_var,
    }


def measure(shards: ShardSet, w: World) -> dict[str, Any]:
    """All of it, on every rank."""
    found = {name: step(*case, shards, w) for name, case in CASES.items()}
    return {
        "steps": found,
        "segments": w.gather(segments(shards, w)),
        "uneven": uneven(w),
        "statistics": statistics(shards, w),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group("cpu") as w:
        result = measure(open_shards(Path(sys.argv[1])), w)
        if w.main:
            torch.save(result, sys.argv[2])
