"""What learns: encoder, loss, optimizer, precision, and one training step. The benchmark times this same step."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from simsiam_dali import factory, sync_bn
from simsiam_dali.clock import mark
from simsiam_dali.config import Config
from simsiam_dali.data.loader import Batch, Single
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.distributed import World, rows_of_all_ranks
from simsiam_dali.encoders import Scored, encoder_type


class Learner:
    """Encoder, loss, optimizer and gradient scaler on this process's device.

    shards: whose tags a loss may learn from. pretrained: False where the weights will come from a checkpoint. Seeds
    torch's generator with `train.seed`, so that all ranks, and all runs of one seed, begin with the same weights.
    """

    def __init__(self, config: Config, shards: ShardSet, world: World, pretrained: bool = True) -> None:
        torch.manual_seed(config.train.seed)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        self.device = world.device
        self.dtype = autocast_dtype(config.train.precision, world.device)

        encoder = factory.create_encoder(config, pretrained)
        if config.train.sync_bn and world.size > 1:
            sync_bn.convert(encoder, world.device)
        layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.encoder = encoder.to(world.device).to(memory_format=layout)
        self.model: Callable[..., Any] = self.encoder
        if world.size > 1:
            self.model = DistributedDataParallel(encoder, device_ids=None if world.gpu is None else [world.gpu])
        if config.train.compile:
            self.model = torch.compile(self.model)

        self.compares = encoder_type(config).compares
        self.loss_fn = factory.create_loss_fn(config, shards, world.device)
        self.optimizer = factory.create_optimizer(config, self.encoder)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == torch.float16)

    @property
    def half(self) -> bool:
        """Whether it computes in 16 bits."""
        return self.dtype != torch.float32

    def autocast(self) -> torch.autocast:
        """The precision's context, for whatever runs the encoder."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.half)

    def score(self, batch: Batch | Single) -> Scored:
        """The loss of a batch by the encoder alone, for validation: nothing here waits for another process."""
        with self.autocast():
            return self.loss_fn(self.encoder(*batch[:-1]), batch.segment)

    def _score(self, batch: Batch | Single) -> Scored:
        """The loss of this step, which is that of all ranks' batches where its segments are compared."""
        with self.autocast():
            outputs, segment = self.model(*batch[:-1]), batch.segment
            if self.compares:
                segment = rows_of_all_ranks(segment)
                together = tuple(map(rows_of_all_ranks, outputs if isinstance(outputs, tuple) else (outputs,)))
                outputs = together if isinstance(outputs, tuple) else together[0]
            return self.loss_fn(outputs, segment)

    def step(self, batch: Batch | Single, lr: float, fixed_lr: float) -> Scored:
        """One step at these learning rates; the result is detached, and left on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = fixed_lr if group["fix_lr"] else lr
        with mark("forward"):
            scored = self._score(batch)
        with mark("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(scored.loss).backward()
        with mark("update"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return Scored(*(tensor.detach() for tensor in scored))

    def state_dict(self) -> dict[str, Any]:
        """Weights, momentum and the scaler's state."""
        return {
            "encoder": self.encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.encoder.load_state_dict(state["encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where it was not needed: bf16 before, on a GPU that has fp16 only now
            self.scaler.load_state_dict(state["scaler"])


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the encoder computes in for `train.precision`; float32 = no autocast."""
    if precision == "auto":
        if device.type == "cpu":
            return torch.float32
        # Emulation (T4, RTX 20) does not count: fp16 is what these compute in.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
