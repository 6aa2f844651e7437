"""Work for the tests of worker processes, which import it by name."""

import os
import signal
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
