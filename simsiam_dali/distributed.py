"""One process or many under `torchrun`: rank, device, and the few collective calls the trainer needs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from simsiam_dali.errors import UserError


@dataclass(frozen=True)
class World:
    """This process's place among `size` processes, and its device. Only the `main` process writes."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    @property
    def gpu(self) -> int | None:
        """CUDA device number, None on the CPU."""
        return self.device.index if self.device.type == "cuda" else None

    def gather(self, thing: Any) -> list[Any]:
        """`thing` of every rank, on every rank, in the order of ranks. It travels pickled: keep it on the CPU."""
        if self.size == 1:
            return [thing]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, thing)
        return everyone


def is_main() -> bool:
    """Whether this is rank 0, also before the process group is joined."""
    return os.environ.get("RANK", "0") == "0"


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """`auto | cpu | gpu` to a torch device. Raises UserError for a GPU that is not there."""
    available = torch.cuda.is_available()
    if wanted == "gpu" and not available:
        raise UserError(
            "train.device is gpu, but torch sees no CUDA device: check nvidia-smi and the driver, or use --device cpu"
        )
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"this host has {torch.cuda.device_count()} GPUs: start at most as many processes (torchrun)")
    return torch.device("cuda", local_rank)


@contextmanager
def world(wanted_device: str) -> Iterator[World]:
    """Join the process group when started by `torchrun`, and leave it at the end."""
    rank, size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = choose_device(wanted_device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank, size, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()
