"""A pool of processes for work that may kill a process: a decoder's crash costs one task, not the run.

Each worker has a pipe of its own and one task at a time, so that the death of any worker, at any moment, is seen as the
end of its pipe and concerns its task only. Pools with a queue that workers share lose it, or tasks, with a worker.
"""

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
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Not fork: the caller has threads. Not spawn: the server imports the libraries once for all workers.
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Died:
    """Instead of a result: the process that worked on the task ended without one."""

    exit_code: int | None


def run_all(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Generator[tuple[T, R | Died], None, None]:
    """Yield `(task, function(task))` as results come, from `workers` processes, which end with the caller.

    An exception in `function` is raised here. A process that dies yields `Died` for its task and is replaced. A task
    leaves `tasks` when a worker is free.
    """
    waiting = iter(tasks)
    pool: dict[Connection, BaseProcess] = {}
    task_of: dict[Connection, T] = {}

    def start(task: T) -> None:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_work, args=(function, theirs), daemon=True)
        process.start()
        theirs.close()
        pool[ours] = process
        send(ours, task)

    def send(connection: Connection, task: T) -> None:
        task_of[connection] = task
        with contextlib.suppress(BrokenPipeError):  # it died idle, which is seen as the end of its pipe
            connection.send(task)

    def stop(connection: Connection) -> int | None:
        process = pool.pop(connection)
        connection.close()
        process.terminate()
        process.join()
        return process.exitcode

    try:
        for task in itertools.islice(waiting, workers):
            start(task)
        while pool:
            for connection in wait(list(pool)):
                assert isinstance(connection, Connection)
                done = task_of.pop(connection)
                following = next(waiting, None)
                try:
                    result, error = connection.recv()
                except (EOFError, ConnectionResetError):
                    pool[connection].join(1)
                    result, error = Died(stop(connection)), None
                    if following is not None:
                        start(following)
                else:
                    if following is None:
                        stop(connection)
                    else:
                        send(connection, following)
                if error is not None:
                    raise error
                yield done, result
    finally:
        for connection in list(pool):
            stop(connection)


def _work(function: Callable[[Any], Any], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
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


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
