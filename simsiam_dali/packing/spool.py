"""A list whose items lie on the disk: a library of any size packs in the memory of a small one."""

import os
import pickle
from array import array
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Generic, TypeVar

T = TypeVar("T")


class Spool(Generic[T]):
    """`length` places to put an item in once, 16 bytes of memory each.

    The items are pickled into a file in `folder` that has no name, so that nobody else can have written what is read
    back. Raises `OSError` where the disk is full.
    """

    def __init__(self, length: int, folder: Path) -> None:
        self._file = TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115 - it lives as long as the list
        self._starts, self._sizes = array("q", [0]) * length, array("q", [0]) * length
        self._end = 0

    def __len__(self) -> int:
        return len(self._starts)

    def __setitem__(self, place: int, item: T) -> None:
        content = memoryview(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
        self._starts[place], self._sizes[place] = self._end, len(content)
        while content:  # a disk that fills up takes a part
            written = os.pwrite(self._file.fileno(), content, self._end)
            self._end, content = self._end + written, content[written:]

    def __getitem__(self, place: int) -> T:
        if not self._sizes[place]:
            raise IndexError(f"nothing was put at {place}")
        item: T = pickle.loads(os.pread(self._file.fileno(), self._sizes[place], self._starts[place]))
        return item

    def __iter__(self) -> Iterator[T]:
        return (self[place] for place in range(len(self)))
