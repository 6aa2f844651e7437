"""A list whose items are on the disk, so that memory does not grow with the library."""

import os
import pickle
from array import array
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Generic, TypeVar

T = TypeVar("T")


class Spool(Generic[T]):
    """A list of `length` items, each set once; 16 bytes of memory each.

    The items are pickled into a nameless file in `folder`, which no other process can write. Raises `OSError` if the
    disk is full.
    """

    def __init__(self, length: int, folder: Path) -> None:
        self._file = TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115 - open as long as the list
        self._starts, self._sizes = array("q", [0]) * length, array("q", [0]) * length
        self._end = 0

    def __len__(self) -> int:
        return len(self._starts)

    def __setitem__(self, place: int, item: T) -> None:
        content = memoryview(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
        self._starts[place], self._sizes[place] = self._end, len(content)
        while content:  # a disk that fills up accepts a part
            written = os.pwrite(self._file.fileno(), content, self._end)
            self._end, content = self._end + written, content[written:]

    def __getitem__(self, place: int) -> T:
        if not self._sizes[place]:
            raise IndexError(f"item {place} was not set")
        item: T = pickle.loads(os.pread(self._file.fileno(), self._sizes[place], self._starts[place]))
        return item

    def __iter__(self) -> Iterator[T]:
        return (self[place] for place in range(len(self)))
