"""A crew of processes for work that may kill a process: a decoder's crash costs one task, not the run."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Not fork: the caller has threads. Not spawn: the server imports the libraries once for all workers.
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Died:
    """In place of a result: the process that worked on the task ended without one."""

    exit_code: int | None


class Executor(Protocol):
    """What works on many tasks at once: `run_all` here, or another with its promises."""

    def __call__(
        self, function: Callable[[T], R], tasks: Iterable[T], workers: int
    ) -> Generator[tuple[T, R | Died], None, None]:
        """See `run_all`."""
        ...


@dataclass
class _Worker(Generic[T]):
    process: BaseProcess
    task: T


def run_all(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Generator[tuple[T, R | Died], None, None]:
    """Yield `(task, function(task))` as results come, from `workers` processes; they end with the caller.

    An exception in `function` is raised here. A process that dies gives `Died` for its task and is replaced.
    """
    waiting = iter(tasks)
    crew: dict[Connection, _Worker[T]] = {}

    def hire(task: T) -> None:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_work, args=(function, theirs), daemon=True)
        process.start()
        theirs.close()
        crew[ours] = _Worker(process, task)
        give(ours, task)

    def give(connection: Connection, task: T) -> None:
        crew[connection].task = task
        with contextlib.suppress(BrokenPipeError):  # it died idle: seen as the end of its pipe
            connection.send(task)

    def dismiss(connection: Connection) -> int | None:
        worker = crew.pop(connection)
        connection.close()
        worker.process.terminate()
        worker.process.join()
        return worker.process.exitcode

    try:
        for task in itertools.islice(waiting, workers):
            hire(task)
        while crew:
            for connection in wait(list(crew)):
                assert isinstance(connection, Connection)
                done = crew[connection].task
                following = next(waiting, None)
                try:
                    result, error = connection.recv()
                except (EOFError, ConnectionResetError):
                    crew[connection].process.join(1)
                    result, error = Died(dismiss(connection)), None
                    if following is not None:
                        hire(following)
                else:
                    if following is None:
                        dismiss(connection)
                    else:
                        give(connection, following)
                if error is not None:
                    raise error
                yield done, result
    finally:
        for connection in list(crew):
            dismiss(connection)


def _work(function: Callable[[Any], Any], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, Exception | None] = (function(task), None)
        except Exception as e:
            answer = (None, e)
        connection.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
