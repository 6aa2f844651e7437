"""Stages for the benchmark's tests; a module of its own, since each is opened in a new process."""

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from measure import Stage
from stages import Spec

from simsiam_dali.common.errors import UserError


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


def only_one(file: Path) -> Stage:
    """A stage that cannot be open beside another of its kind, as where memory is for one."""
    lock = file.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError("there is room for one only") from None
    return Stage(batch for batch in numbered(2) if not lock.closed)


def numbers_of(spec: Spec) -> Stage:
    """In the place of `open_stage`; one kind cannot be opened."""
    if spec.kind == "loader/all":
        raise UserError("no such thing")
    return numbers()
