"""SIGKILL at a chosen file-system call: code for the beginning of a command that runs in a process of its own."""

import os
import traceback
from pathlib import Path

KILL_AT = """
import os as _os, signal as _signal, sys as _sys
_calls = [0]
_log = open({log!r}, "w", buffering=1)
def _watch(event, args):
    is_write = event == "open" and isinstance(args[2], int) and args[2] & (_os.O_WRONLY | _os.O_RDWR)
    if is_write or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
        if _calls[0] == {number}:
            _os.kill(_os.getpid(), _signal.SIGKILL)
        _calls[0] += 1
        _log.write(event + " " + " ".join(map(str, args[:2])) + chr(10))
_sys.addaudithook(_watch)
"""


def run_forked(code: str, folder: Path) -> bool:
    """Run code that starts no threads in a fork of this process; whether a signal ended it. It must not fail."""
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(folder)
            exec(compile(code, "<killed>", "exec"), {})
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)
