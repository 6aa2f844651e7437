"""The share of time spent waiting for data: wherever the loader takes its time, it is told."""

import time
from collections.abc import Iterator

import pytest
import torch

from simsiam_dali.clock import StepClock

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
