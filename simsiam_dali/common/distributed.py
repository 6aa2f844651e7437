"""One process or many under `torchrun`: rank, device, the few collective calls the trainer needs, and error reports.

Where a rank fails or is killed, all of them fail at the next collective call. The first failing rank reports; the
others exit quietly. torchrun adds its own report, which names the process that ended first.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.terminal import print_line


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

    def print(self, line: str) -> None:
        """Print on the main process only, above a progress bar."""
        if self.main:
            print_line(line)

    def gather(self, thing: Any) -> list[Any]:
        """`thing` of every rank, on every rank, in the order of ranks. It travels pickled: keep it on the CPU."""
        if self.size == 1:
            return [thing]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, thing)
        return everyone


def count_of_each_rank(count: int) -> list[int]:
    """`count` of every rank, in the order of ranks. All ranks must call it; it does not wait for a GPU."""
    if not dist.is_initialized():
        return [count]
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    counts[dist.get_rank()] = count
    dist.all_reduce(counts)
    return counts.tolist()


def rows_of_all_ranks(x: Tensor, counts: Sequence[int]) -> Tensor:
    """`(B, ...)` of each rank to `(sum of B, ...)` on every rank, in the order of ranks; differentiable.

    counts: B of each rank (`count_of_each_rank`). They may differ, since a segment that does not decode makes one
    rank's batch smaller. All ranks must call it. Without a process group it is `x`.
    """
    return _RowsOfAllRanks.apply(x, counts) if dist.is_initialized() else x


class _RowsOfAllRanks(torch.autograd.Function):
    """Each rank adds its rows to zeros; a row's gradient is the sum of what all ranks' losses give it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Sequence[int]) -> Tensor:
        first = sum(counts[: dist.get_rank()])
        ctx.own = slice(first, first + len(x))
        rows = x.new_zeros(sum(counts), *x.shape[1:])
        rows[ctx.own] = x
        dist.all_reduce(rows)
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.own], None


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
def process_group(wanted_device: str) -> Iterator[World]:
    """Join the process group when started by `torchrun`, and leave it at the end.

    After an error in the block, SIGTERM is ignored: only the report is left to do. torchrun kills what hangs there.
    """
    rank, size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = choose_device(wanted_device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank, size, device)
        return
    # Batches have tensors on both: the data on the GPU, which segments they are on the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size, device)
    except Exception:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which may have seen another rank die meanwhile
        reports_first()  # before the others see this rank leave
        raise
    finally:
        dist.destroy_process_group()


@functools.cache
def reports_first() -> bool:
    """Whether this rank is the first of its run to ask, and so the one that reports; True without torchrun."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        # torchrun itself keeps the store, so it is there whichever rank is gone.
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=10)))
        return bool(store.add("simsiam_dali/errors", 1) == 1)
    except dist.DistError:  # torchrun is gone too: better reported twice than never
        return True


def report_error_once(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command's `main`: the first rank's error is raised, the others' become exit status 1.

    A collective call that fails because another rank died becomes a UserError.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except Exception as e:
            if not reports_first():
                sys.exit(1)
            if isinstance(e, dist.DistError) or "gloo/transport" in str(e):  # gloo has no type of its own
                raise UserError(
                    "another rank died (killed, out of memory, or its host is gone; see torchrun's report), so all"
                    " ranks stop: continue from the last checkpoint with --resume"
                ) from e
            raise

    return wrapped
