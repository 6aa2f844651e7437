"""Work for the tests of worker processes, which import it by name."""

import os
import signal
import struct
import sys
from pathlib import Path


def work(task: int) -> int:
    """Square; 3 raises, 5 kills its process, 7 leaves it."""
    if task == 3:
        raise OSError(28, "No space left on device")
    if task == 5:
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == 7:
        os._exit(9)
    return task * task


def work_once_killed(marker: Path) -> str:
    """The marker's name; the first process that works on it is killed, as by the system when memory is short."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return marker.name


def work_half_answered_once(marker: Path) -> str:
    """The marker's name; the first process that works on it dies in the middle of its answer."""
    if not marker.exists():
        marker.touch()
        connection = sys._getframe(2).f_locals["connection"]  # of process_pool._work
        os.write(connection.fileno(), struct.pack("!i", 100) + b"half")
        os._exit(9)
    return marker.name


def how_sigint_is_met(_task: int) -> tuple[bool, bool, bool]:
    """Whether this process ignores SIGINT, whether it blocks it, and whether the fork server does."""
    of_server = Path(f"/proc/{os.getppid()}/status").read_text().split("SigBlk:")[1].split()[0]
    own = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    ignores = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    return ignores, own, bool(int(of_server, 16) >> (signal.SIGINT - 1) & 1)
