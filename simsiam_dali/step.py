"""One training step: learning rates, precision, forward, loss, backward, update. The benchmark times this same one."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from simsiam_dali.config import Config
from simsiam_dali.data.loader import Batch


def learning_rates(config: Config, step: int, steps_per_epoch: int, batch: int) -> tuple[float, float]:
    """(the encoder's rate, the rate of groups marked `fix_lr`) at optimizer step `step`.

    lr = learning_rate x batch / 256, a linear warm-up, then half a cosine to 0; the predictor's stays (section 4.2).
    batch: segments a step over all processes.
    """
    base = config.encoder.learning_rate * batch / 256
    warmup = config.encoder.simsiam.warmup_epochs * steps_per_epoch
    if step < warmup:
        return base * (step + 1) / (warmup + 1), base
    done = (step - warmup) / max(1.0, config.encoder.epochs * steps_per_epoch - warmup)
    return base * 0.5 * (1 + math.cos(math.pi * done)), base


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the encoder computes in; float32 = no autocast."""
    if precision == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


@contextmanager
def mark(name: str) -> Iterator[None]:
    """Name a part of the step in the profiler's trace and, on a GPU, as an NVTX range beside DALI's own (Nsight)."""
    with torch.profiler.record_function(name):
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.nvtx.range_pop()


def train_step(
    model: Callable[..., Any],
    loss_fn: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: Callable[[], AbstractContextManager[Any]],
    batch: Batch,
    lr: float,
    fixed_lr: float,
) -> tuple[Tensor, Tensor]:
    """One step on one batch: (loss, view 1's projections `(B, d)`), both detached and left on the device."""
    for group in optimizer.param_groups:
        group["lr"] = fixed_lr if group["fix_lr"] else lr
    with mark("forward"), autocast():
        p1, p2, z1, z2 = model(batch.view1, batch.view2)
        loss = loss_fn(p1, p2, z1, z2)
    with mark("backward"):
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
    with mark("update"):
        scaler.step(optimizer)
        scaler.update()
    return loss.detach(), z1.detach()
