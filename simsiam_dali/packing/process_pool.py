"""A pool of processes for work that may kill a process: a decoder's crash costs one task, not the run.

Each worker has a pipe of its own and one task at a time, so that the death of any worker, at any moment, is seen as the
end of its pipe and concerns its task only. Pools with a queue that workers share lose it, or tasks, with a worker.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from simsiam_dali.common.errors import UserError

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
                    _start_server()
                    ours, theirs = _CONTEXT.Pipe()
                    process = _CONTEXT.Process(target=_work, args=(function, theirs), daemon=True)
                    process.start()  # until then, there is nothing that `stop` could terminate
                    pool[ours] = process
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
                except (EOFError, OSError):  # in the middle of an answer, it is a plain OSError
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


def _start_server() -> None:
    """Start the fork server, if it does not run, with SIGINT blocked: it and its workers have that from the first.

    Ctrl-C reaches the whole group, and while they import they would print a KeyboardInterrupt of their own. Raises
    UserError where the folder of temporary files has too long a name for the server's socket.
    """
    resource_tracker.ensure_running()  # before, since its start unblocks the signal
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    except OSError as e:
        if "AF_UNIX" not in str(e):
            raise
        raise UserError(
            f"the name of the folder for temporary files, {tempfile.gettempdir()}, is too long for a socket: set TMPDIR"
            " to a folder with a name of at most 75 characters"
        ) from e
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _work(function: Callable[[Any], Any], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # A parent that stops may close its end while an answer lies there unread, which resets the connection.
    with contextlib.suppress(EOFError, OSError):
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
