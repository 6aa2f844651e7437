"""Ctrl-C and SIGTERM end a command at a place where its work is whole."""

import signal
from types import FrameType
from typing import Self


class Interrupt:
    """Records SIGINT or SIGTERM in `signal`, which the caller polls; the same signal again ends the process at once.

    The handlers before it are restored at the end of the `with` block, but for SIGTERM's if the block raised: torchrun
    sends that when another rank has died, while this one still reports its error.
    """

    def __init__(self) -> None:
        self.signal = 0
        """Number of the signal that came, or 0."""

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None and issubclass(kind, Exception)
        for number, handler in self._before.items():
            if not (failed and number == signal.SIGTERM):
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)


def raise_keyboard_interrupt() -> None:
    """Let SIGTERM, and SIGINT even where a shell's background job ignores it, raise KeyboardInterrupt."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise)


def _raise(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
