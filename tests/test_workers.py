"""Worker processes: results, exceptions, deaths."""

import signal

import pytest
from helpers.tasks import work

from simsiam_dali.packing.process_pool import Died, run_all


@pytest.mark.parametrize("workers", [1, 2, 20])
def test_every_task_is_answered_though_processes_die(workers: int) -> None:
    tasks = [0, 5, 1, 2, 7, 5, 4, 6]
    answers = sorted(run_all(work, tasks, workers), key=lambda answer: answer[0])
    assert answers == [
        (0, 0),
        (1, 1),
        (2, 4),
        (4, 16),
        (5, Died(-signal.SIGSEGV)),
        (5, Died(-signal.SIGSEGV)),
        (6, 36),
        (7, Died(9)),
    ]


def test_an_exception_reaches_the_caller() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        list(run_all(work, [1, 3, 2], 2))
    assert caught.value.errno == 28


def test_no_tasks() -> None:
    assert list(run_all(work, [], 2)) == []
