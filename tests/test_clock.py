"""The share of time spent waiting for data: wherever the loader takes its time, it is told."""

import time
from collections.abc import Iterator

import pytest
import torch

from simsiam_dali.training.throughput import StepClock

NAP = 0.05  # s


@pytest.mark.parametrize("slow", [0, 2, 3])  # before the first of three batches, before the last, after it
def test_waiting_is_counted_at_both_ends_of_an_epoch(slow: int) -> None:
    def loader() -> Iterator[int]:
        for number in range(3):
            if number == slow:
                time.sleep(NAP)
            yield number
        if slow == 3:
            time.sleep(NAP)

    clock = StepClock(torch.device("cpu"))
    assert list(clock.batches(loader())) == [0, 1, 2]
    seconds, waited = clock.read()
    assert clock.steps == 3
    assert NAP <= waited * seconds <= seconds


def test_on_a_gpu_no_core_spins_while_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that block, and gaps counted from the end of one step to the next batch: a stand-in for CUDA's events."""
    times = iter(range(100))  # ms

    class Event:
        def __init__(self, enable_timing: bool, blocking: bool) -> None:
            assert enable_timing
            assert blocking

        def record(self) -> None:
            self.at = next(times)

        def synchronize(self) -> None:
            assert self.at is not None

        def elapsed_time(self, later: "Event") -> float:
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("spins"))
    clock = StepClock(torch.device("cuda", 0))
    assert list(clock.batches([0, 1, 2])) == [0, 1, 2]
    seconds, share = clock.read()
    assert share * seconds == pytest.approx(3 / 1000)  # the gaps before the second, the third and the end, 1 ms each
