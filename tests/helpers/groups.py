"""What the processes of a group do, which signals change at some later moment."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 300.0
"""What a change may take on a busy machine."""


def alive_in_group(group: int) -> dict[str, str]:
    """Process id -> state, as in /proc, without processes that ended and only wait to be collected."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text().rpartition(") ")[2].split(" ")[:3]
            if its_group == str(group) and state not in "ZX":
                found[path.parent.name] = state
    return found


def until(condition: Callable[[], bool]) -> None:
    """Wait for it; an error where it does not come."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
