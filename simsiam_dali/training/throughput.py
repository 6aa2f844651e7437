"""How long the model waits for data, measured where it waits.

On a CPU that is the time the loop spends in the loader. On a GPU the host runs ahead, so host time says little: there
the gap on the stream is measured, between the last kernel of one step and the first after the next batch has come. The
loop also stays at most one step ahead of the GPU, which is enough to keep it busy and makes an interrupt prompt.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def mark(name: str) -> Iterator[None]:
    """Name a part of the step in the profiler's trace and, on a GPU, as an NVTX range beside DALI's own (Nsight)."""
    with torch.profiler.record_function(name):
        nvtx = torch.cuda.is_initialized()
        if nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if nvtx:
                torch.cuda.nvtx.range_pop()


class StepClock:
    """Iterates over batches while adding up the seconds that passed and the seconds spent without data."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self.steps = 0
        self.waited = 0.0  # s
        self.started = time.perf_counter()
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """The loader's batches; the time until each comes is waiting, the time until the next is asked for is work."""
        batches = iter(loader)
        done: torch.cuda.Event | None = None
        while True:
            asked = time.perf_counter()
            with mark("data"):
                batch = next(batches, None)  # what ends an epoch takes its time, too: the loader finishes its turn
            if self.cuda:
                came = _recorded_event()
                if done is not None:
                    self._gaps.append((done, came))
            else:
                self.waited += time.perf_counter() - asked
            if batch is None:
                return
            self.steps += 1
            yield batch
            if self.cuda:
                previous, done = done, _recorded_event()
                if previous is not None:
                    previous.synchronize()

    def read(self) -> tuple[float, float]:
        """(seconds of the window, share of it spent waiting for data); on a GPU this waits for its work to finish."""
        if self.cuda:
            _recorded_event().synchronize()
            self.waited += sum(done.elapsed_time(came) for done, came in self._gaps) / 1000
            self._gaps.clear()
        seconds = time.perf_counter() - self.started
        return seconds, self.waited / seconds if seconds > 0 else 0.0


def _recorded_event() -> torch.cuda.Event:
    """An event at the end of what the GPU has been given; waiting for it leaves the core to DALI's threads."""
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record()
    return event
