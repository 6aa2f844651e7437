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
from collections.abc import Callable, Generator, Iterable, Iterator
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
    """Instead of a result: the process that worked on the task ended without one, twice."""

    exit_code: int | None


def run_all(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Generator[tuple[T, R | Died], None, None]:
    """Yield `(task, function(task))` as results come, from `workers` processes, which end with the caller.

    An exception in `function` is raised here. If a process dies, another one gets its task; if that dies too, `Died` is
    yielded for it. A task leaves `tasks` when a worker is free.
    """
    waiting: Iterator[tuple[T, bool]] = ((task, True) for task in tasks)
    pool: dict[Connection, BaseProcess] = {}
    busy: dict[Connection, tuple[T, bool]] = {}  # the task, and whether its worker is the first to have it
    idle: list[Connection] = []

    def stop(connection: Connection) -> int | None:
        process = pool.pop(connection)
        connection.close()
        process.terminate()
        process.join()
        return process.exitcode

    try:
        while True:
            for task, is_first in itertools.islice(waiting, workers - len(busy)):
                if not idle:
                    ours, theirs = _CONTEXT.Pipe()
                    pool[ours] = _CONTEXT.Process(target=_work, args=(function, theirs), daemon=True)
                    pool[ours].start()
                    theirs.close()
                    idle.append(ours)
                connection = idle.pop()
                busy[connection] = task, is_first
                with contextlib.suppress(ConnectionError):  # it died idle, which is seen as the end of its pipe
                    connection.send(task)
            if not busy:
                return
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                task, is_first = busy.pop(ready)
                try:
                    result = ready.recv()
                    idle.append(ready)
                except (EOFError, ConnectionResetError):
                    result = Died(stop(ready))
                    if is_first:
                        waiting = itertools.chain([(task, False)], waiting)
                        continue
                if isinstance(result, Exception):
                    raise result
                yield task, result
    finally:
        for connection in list(pool):
            stop(connection)


def _work(function: Callable[[Any], Any], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # A parent that stops may close its end while an answer lies there unread, which resets the connection.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.send(_answer(function, connection.recv()))


def _answer(function: Callable[[Any], Any], task: Any) -> Any:
    try:
        return function(task)
    except Exception as e:
        return e


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
