"""Worker processes: results, exceptions, deaths."""

import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import fork_server
from helpers.tasks import work, work_half_answered_once, work_once_killed

from simsiam_dali.packing import process_pool
from simsiam_dali.packing.process_pool import _CONTEXT, Died, _work, run_all


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


def test_a_killed_worker_costs_nothing(tmp_path: Path) -> None:
    tasks = [tmp_path / str(n) for n in range(5)]
    assert sorted(run_all(work_once_killed, tasks, 2)) == [(task, task.name) for task in tasks]


def test_a_worker_that_dies_in_the_middle_of_an_answer_costs_nothing(tmp_path: Path) -> None:
    tasks = [tmp_path / str(n) for n in range(3)]
    assert sorted(run_all(work_half_answered_once, tasks, 2)) == [(task, task.name) for task in tasks]


def test_an_interrupt_while_a_worker_starts_is_the_caller_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """As multiprocessing, such a process cannot be terminated: it has no number yet."""

    class Interrupted(_CONTEXT.Process):  # type: ignore
        def start(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(process_pool, "_CONTEXT", SimpleNamespace(Pipe=_CONTEXT.Pipe, Process=Interrupted))
    with pytest.raises(KeyboardInterrupt):
        list(run_all(work, [1], 1))


ASKING = """
from helpers.tasks import how_sigint_is_met
from simsiam_dali.packing.process_pool import run_all
print(*run_all(how_sigint_is_met, [0], 1))
"""


def in_new_process(code: str, **environment: Any) -> str:
    """What the code prints in a new interpreter: it has no fork server, and no folder for temporary files yet."""
    words = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}"]
    done = fork_server.fresh(words, env=environment)
    return done.stdout + done.stderr


def test_no_process_of_the_pool_is_interrupted_before_it_ignores_that() -> None:
    assert in_new_process(ASKING) == "(0, (True, False, True))\n"


LINE = """
from simsiam_dali.common.errors import one_line_errors
from simsiam_dali.packing.process_pool import run_all
one_line_errors(lambda: print(*run_all(abs, [-1], 1)))()
"""


def test_too_long_a_folder_of_temporary_files_is_reported_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 76)
    folder.mkdir()
    (line,) = in_new_process(LINE, TMPDIR=str(folder)).splitlines()
    assert line.startswith(f"error: the name of the folder for temporary files, {folder}, is too long")
    assert "set TMPDIR" in line


def test_an_exception_reaches_the_caller() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        list(run_all(work, [1, 3, 2], 2))
    assert caught.value.errno == 28


def test_no_tasks() -> None:
    assert list(run_all(work, [], 2)) == []


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_worker_whose_answer_nobody_read_ends_quietly(tasks: int) -> None:
    """As after Ctrl-C: closing a socket with unread data resets the connection instead of ending it."""
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_work, args=(work, theirs), daemon=True)
    process.start()
    theirs.close()
    for task in range(tasks):
        ours.send(task)
    assert ours.poll(60)
    ours.close()
    process.join(60)
    assert process.exitcode == 0  # an exception would be printed, and give 1
