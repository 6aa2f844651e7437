"""Start Python commands from a process that has imported torch, DALI and the rest already.

A command's imports cost 2 to 7 s of CPU time, and the suite starts hundreds. `start` asks a server process to fork; the
fork becomes the command: its own process id, working directory, environment, standard streams and session, the module
run as `__main__`, and an end like any interpreter's (exit status, signals, atexit), so a SIGKILL is a real one.

A test process has its server, which ends with it and holds no Python thread, data pipeline or CUDA context. On a host
with a GPU, or where the environment changes what imports read (`AT_IMPORT`), commands start as ordinary subprocesses.

The commands' standard output and error are files, not pipes: nobody has to read them while a command runs.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

OF_ALL = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
"""Of the server, and so of every command: tests that run side by side do not disturb each other, and see at once what
a command prints, also one that they kill.
"""
AT_IMPORT = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONHASHSEED", "MPLBACKEND"}


class Process:
    """A command that was started by the server, with subprocess.Popen's methods and attributes."""

    def __init__(self, args: Sequence[str], pid: int, status: socket.socket, out: IO[str], err: IO[str]) -> None:
        self.args, self.pid, self._status, self._files = args, pid, status, (out, err)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The return code, or None while it runs."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        if (code := self._wait(timeout)) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                answer = self._status.recv(64)
            except (TimeoutError, BlockingIOError):
                return None
            assert answer, "the fork server has died"
            self.returncode = os.waitstatus_to_exitcode(int(answer))
            self._status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it printed."""
        self.wait(timeout)
        for file in self._files:
            file.seek(0)
        return self._files[0].read(), self._files[1].read()

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)


def start(
    args: Sequence[str | Path],
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    new_session: bool = False,
) -> "Process | subprocess.Popen[str]":
    """Start a command line; by the server where it is `sys.executable` with -m MODULE, -c CODE or a script.

    env: over this process's environment; None removes a variable.
    """
    words = list(map(str, args))
    environment = _environment(env)
    changed = any(environment.get(name) != _environment({}).get(name) for name in AT_IMPORT)
    if changed or words[0] != sys.executable or _has_gpu():
        return subprocess.Popen(
            words, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=new_session,
        )  # fmt: skip
    out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115 - Process reads them
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = {"args": words[1:], "cwd": str(cwd or Path.cwd()), "env": environment, "new_session": new_session}
    with theirs:
        descriptors = [out.fileno(), err.fileno(), theirs.fileno()]
        socket.send_fds(_server(), [json.dumps(request).encode()], descriptors)
    return Process(words, int(ours.recv(64)), ours, out, err)


def _environment(over: Mapping[str, str | None] | None) -> dict[str, str]:
    changed = {**os.environ, **OF_ALL, **(over or {})}
    return {name: value for name, value in changed.items() if value is not None}


def fresh(
    args: Sequence[str | Path], cwd: Path | None = None, env: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end in a new interpreter, for what depends on the imports."""
    return subprocess.run(
        list(map(str, args)), cwd=cwd, env=_environment(env), capture_output=True, text=True, timeout=600
    )


def run(
    args: Sequence[str | Path],
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    timeout: float | None = 600,
) -> subprocess.CompletedProcess[str]:
    """`start`, and wait for the end."""
    process = start(args, cwd, env)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode or 0, out, err)


@cache
def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


@cache
def _server() -> socket.socket:
    """The server's socket; the server ends when this process closes it, by its end at the latest."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        env = os.environ | OF_ALL | {"PYTHONPATH": path}
        subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    return ours


# --- in the server


def _serve(connection: socket.socket) -> list[str]:
    """Fork at each request; returns only in a fork, with the words that it has to run."""
    interrupt = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test process; its end is ours
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            os._exit(0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        keeper = os.fork()
        if keeper == 0:
            connection.close()
            if words := _keep(json.loads(message), *descriptors, interrupt=interrupt):
                return words
        for descriptor in descriptors:
            os.close(descriptor)


def _keep(request: dict[str, Any], out: int, err: int, status: int, *, interrupt: Any) -> list[str]:
    """Fork the command, tell its process id, wait, and tell its status; returns only in the command's process."""
    pid = os.fork()
    if pid:
        os.write(status, str(pid).encode())
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            os.write(status, str(os.waitpid(pid, 0)[1]).encode())
        os._exit(0)
    os.close(status)
    if request["new_session"]:
        os.setsid()
    for descriptor, number in ((out, 1), (err, 2)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    signal.signal(signal.SIGINT, interrupt)
    return list(request["args"])


def _run(words: list[str]) -> None:
    """What the interpreter does with its command line."""
    kind, *rest = words
    if kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()  # noqa: PTH109
        if not hasattr(sys.modules.get(rest[0]), "__path__"):  # a package's __main__ is run instead
            sys.modules.pop(rest[0], None)  # as in a new interpreter, it is run and not imported
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = words, str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    importlib.import_module("preloaded")  # beside this file

    gc.collect()
    gc.freeze()  # or the end of each command looks through all that was imported: 2 s instead of 0.3 s
    _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
