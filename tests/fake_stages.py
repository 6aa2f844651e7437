"""Stages for the benchmark's tests; a module of its own, since each is opened in a new process."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from measure import Stage

from simsiam_dali.errors import UserError


def numbered(batch: int) -> Iterator[Tensor]:
    """Batches of 0, 1, 2...: no segment comes twice."""
    return (torch.arange(n * batch, (n + 1) * batch) for n in count())


def ticking(file: Path) -> Stage:
    """A stage with a life of its own between batches, as a loader has: its child writes what time it is."""
    if os.fork() == 0:
        while True:
            file.with_suffix(".part").write_text(str(time.monotonic()))
            file.with_suffix(".part").replace(file)  # whole, wherever it is frozen
            time.sleep(0.005)
    while not file.exists():
        time.sleep(0.005)
    return Stage(numbered(1))


def broken(message: str) -> Stage:
    raise UserError(message)


def vanishing() -> Stage:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def numbers() -> Stage:
    return Stage(numbered(2))
