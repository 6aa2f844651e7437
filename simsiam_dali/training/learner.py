"""Encoder, loss, optimizer, precision and one training step. The benchmark times this same step."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from simsiam_dali.common.distributed import World, count_of_each_rank, rows_of_all_ranks
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.schema import Config
from simsiam_dali.data.loader import Batch
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.models.encoder import Encoder, LossOutput
from simsiam_dali.models.recompute import recompute_blocks
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training.throughput import mark

T = TypeVar("T")


def groups(batches: Iterable[T], size: int) -> Iterator[Iterator[T]]:
    """Batches in groups of `size`, one group a step; each is an iterator to exhaust before asking for the next."""
    batches = iter(batches)
    for first in batches:
        yield itertools.chain([first], itertools.islice(batches, size - 1))


class Learner:
    """Encoder, loss, optimizer and gradient scaler on this process's device.

    shards: whose tags a loss may learn from. pretrained: False where the weights will come from a checkpoint. Seeds
    torch's generator with `train.seed`, so that all ranks, and all runs of one seed, start with the same weights.
    """

    def __init__(self, config: Config, shards: ShardSet, world: World, pretrained: bool = True) -> None:
        torch.manual_seed(config.train.seed)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        self.device = world.device
        self.dtype = autocast_dtype(config.train.precision, world.device)

        kind = encoder_type(config)
        encoder = kind.create(pretrained)
        if config.train.sync_bn and world.size > 1:
            if world.device.type == "cpu":
                raise UserError("train.sync_bn works on GPUs only: leave it off on CPUs")
            encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
        if config.train.activation_checkpointing:
            recompute_blocks(encoder)
        size = config.encoder.batch_size
        self.micro_batches = size // config.train.micro_batch_of(size)  # whose gradients make a step
        layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.encoder = encoder.to(world.device).to(memory_format=layout)
        self.model: Callable[..., Any] = self.encoder
        self.parallel: DistributedDataParallel | None = None
        if world.size > 1:
            devices = None if world.gpu is None else [world.gpu]
            self.model = self.parallel = DistributedDataParallel(encoder, device_ids=devices)
        if config.train.compile:
            self.model = torch.compile(self.model)

        self.is_contrastive = kind.is_contrastive
        self.loss_fn = kind.create_loss_fn(shards, world.device)
        self.optimizer = create_optimizer(config, self.encoder)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == torch.float16)
        if self.scaler.is_enabled():
            begin_momentum(self.optimizer)

    @property
    def half(self) -> bool:
        """Whether it computes in 16 bits."""
        return self.dtype != torch.float32

    def autocast(self) -> torch.autocast:
        """The precision's context, for whatever runs the encoder."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.half)

    def validation_loss(self, batch: Batch) -> LossOutput:
        """The loss of a batch for validation: of this rank alone, without DDP, so nothing waits for another rank."""
        with self.autocast():
            outputs = self.encoder(*batch.inputs)
        return self.loss_fn(outputs, batch.segment)

    def _loss(self, batch: Batch) -> LossOutput:
        """The training loss; a contrastive one is computed on the batches of all ranks."""
        with self.autocast():
            outputs, segment = self.model(*batch.inputs), batch.segment
        if self.is_contrastive:
            counts = count_of_each_rank(len(segment))
            segment = rows_of_all_ranks(segment, counts)
            together = [rows_of_all_ranks(x, counts) for x in (outputs if isinstance(outputs, tuple) else [outputs])]
            outputs = tuple(together) if isinstance(outputs, tuple) else together[0]
        return self.loss_fn(outputs, segment)

    def step(self, batches: Iterable[Batch], lr: float, fixed_lr: float) -> LossOutput:
        """One step at these learning rates, on the mean gradient of `micro_batches` batches.

        Returns their mean loss, whether any of them had one, and their z concatenated, detached and on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = fixed_lr if group["fix_lr"] else lr
        self.optimizer.zero_grad(set_to_none=True)
        parts: list[LossOutput] = []
        for number, batch in enumerate(batches, start=1):
            with self._sync_gradients(last=number == self.micro_batches):
                with mark("forward"):
                    output = self._loss(batch)
                with mark("backward"):
                    self.scaler.scale(output.loss / self.micro_batches).backward()
            parts.append(LossOutput(*(tensor.detach() for tensor in output)))
        with mark("update"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.encoder.after_step()
        if len(parts) == 1:
            return parts[0]
        loss, has_loss, z = zip(*parts, strict=True)
        return LossOutput(torch.stack(loss).mean(), torch.stack(has_loss).any(), torch.cat(z))

    def _sync_gradients(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Ranks all-reduce their gradients once a step, in its last backward pass."""
        return contextlib.nullcontext() if last or self.parallel is None else self.parallel.no_sync()

    def share_statistics(self) -> None:
        """Give all ranks the main rank's batch-norm statistics, which are those that are saved.

        DDP does so before the first forward pass of a step, after which each rank's follow its own batches.
        """
        if self.parallel is not None:
            for buffer in self.encoder.buffers():
                torch.distributed.broadcast(buffer, 0)

    def trial_step(self, batch: Batch) -> None:
        """A forward and a backward pass that change no state.

        Raises torch.OutOfMemoryError where they do not fit.
        """
        buffers = [buffer.clone() for buffer in self.encoder.buffers()]
        self.encoder.train()
        try:
            with self.autocast():
                outputs = self.encoder(*batch.inputs)
            loss = self.loss_fn(outputs, batch.segment).loss
            self.scaler.scale(loss).backward()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, before in zip(self.encoder.buffers(), buffers, strict=True):
                    buffer.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        """Weights, momentum and the scaler's state."""
        return {
            "encoder": self.encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.encoder.load_state_dict(state["encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run was saved in bf16 and continues on a GPU with fp16 only
            self.scaler.load_state_dict(state["scaler"])


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast for `train.precision`; float32 = no autocast."""
    if precision == "auto":
        if device.type == "cpu":
            return torch.float32
        # Emulated bf16 (T4, RTX 20) is slower than their fp16.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def create_optimizer(config: Config, encoder: Encoder) -> torch.optim.Optimizer:
    """The optimizer over the encoder's groups; `Learner.step` sets each group's rate by its `fix_lr`."""
    settings = encoder_type(config).settings
    groups = encoder.param_groups()
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=settings.weight_decay, fused=True)
    momentum = settings.sgd_momentum
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, weight_decay=settings.weight_decay, fused=True)


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD its momentum buffers before the first step, as zeros: the step's result is the same.

    torch's fused SGD makes them without values, for the kernel to fill, and the kernel returns at once where the scaled
    gradients have overflowed, as in fp16 the first ones often do: the next step would add what the memory held.
    """
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def base_learning_rate(config: Config, batch: int) -> float:
    """The rate after the warm-up: the configured one x batch / 256 for SGD (arXiv:2011.10566, section 4.1), and as
    configured for AdamW, whose steps do not grow with the gradient. batch: segments in a step, over all ranks.
    """
    settings = encoder_type(config).settings
    configured = config.encoder.learning_rate or settings.learning_rate
    return configured * batch / 256 if settings.optimizer == "sgd" else configured


def describe_optimizer(config: Config, batch: int) -> str:
    """The optimizer and its rate, and where that is from: `batch` as for `base_learning_rate`."""
    settings, given = encoder_type(config).settings, config.encoder.learning_rate
    scaled = f" ({given or settings.learning_rate:g} for 256 segments)" if settings.optimizer == "sgd" else ""
    overrides = f", from encoder.learning_rate in place of the type's own {settings.learning_rate:g}" if given else ""
    return f"{settings.optimizer}, learning rate {base_learning_rate(config, batch):.3g}{scaled}{overrides}"


def learning_rates(config: Config, step: int, steps_per_epoch: int, batch: int) -> tuple[float, float]:
    """(the encoder's rate, the rate of groups marked `fix_lr`) at optimizer step `step`; a resumed run needs no state.

    A linear warm-up to the base rate, then half a cosine to 0; `fix_lr` groups stay at the base rate (arXiv:2011.10566,
    section 4.2). batch: segments in a step, over all ranks.
    """
    base = base_learning_rate(config, batch)
    warmup = encoder_type(config).settings.warmup_epochs * steps_per_epoch
    if step < warmup:
        return base * (step + 1) / (warmup + 1), base
    done = (step - warmup) / max(1.0, config.encoder.epochs * steps_per_epoch - warmup)
    return base * 0.5 * (1 + math.cos(math.pi * done)), base
