"""Errors that the user can fix, reported in one line.

Everything the user may get wrong (a missing folder, a key that does not exist, a batch larger than the data set)
raises `UserError`; the commands print it as one line and exit with status 1. A traceback means a bug of this package;
there is none after Ctrl-C.
"""

import functools
import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """Says in one line what is wrong, where, and what to do about it."""


def one_line(error: BaseException) -> str:
    """The text of an error, as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def printable(text: str) -> str:
    """`text` for a terminal: whatever is not shown as itself (control, direction, unassigned) becomes a U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def one_line_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command's `main`: a `UserError` becomes one line on stderr and exit status 1, Ctrl-C "stopped" and 130."""
    return stops_with()(main)


def stops_with(state: str = "") -> Callable[[Callable[[], None]], Callable[[], None]]:
    """`one_line_errors` for a command whose line after Ctrl-C ends with `state`, which says what it leaves behind."""
    stopped = f"stopped: {state}" if state else "stopped"

    def wrap(main: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def wrapped() -> None:
            try:
                main()
            except UserError as e:
                print(f"error: {printable(str(e))}", file=sys.stderr)
                sys.exit(1)
            except KeyboardInterrupt:
                print(stopped, file=sys.stderr)
                sys.exit(128 + signal.SIGINT)

        return wrapped

    return wrap
