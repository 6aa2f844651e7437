"""Partial results of a long computation, from which it continues after a kill with the same bytes.

A folder beside the output holds `key.json`, which identifies the computation, and `NNNNNN.pt`, the rows of some batches
and the loader's state after them. Each file is written atomically.
"""

import fcntl
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import atomic_write, refuse_failed_write
from simsiam_dali.data.format import Split

_KEY, _LOCK = "key.json", ".lock"


class PartialResults:
    """The parts in `folder`; those of another `key` are removed. Use with `with`: the folder is locked meanwhile.

    Raises UserError where the folder cannot be written, or another process holds it.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder, self.key = folder, key
        # rows (n,) int64; vectors (n, D) float32; their split; the loader's state after them, None at the split's end
        self.parts: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / _LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"another process is working in {self.folder}: wait until it ends") from e
        except OSError as e:
            raise UserError(f"cannot write {self.folder}: {e.strerror}") from e
        self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def __len__(self) -> int:
        """Number of rows."""
        return sum(len(part["rows"]) for part in self.parts)

    def add(self, rows: Tensor, vectors: Tensor, split: Split, loader: dict[str, Any] | None) -> None:
        """Store rows `(n,)` and vectors `(n, D)`, on the CPU, and the loader's state after them."""
        part = {"rows": rows, "vectors": vectors, "split": split, "loader": loader}
        self._write(self._file(len(self.parts)), lambda file: torch.save(part, file))
        self.parts.append(part)

    def all(self) -> tuple[Tensor, Tensor]:
        """Rows `(N,)` and vectors `(N, D)` of all parts, in the order in which they were added."""
        return torch.cat([part["rows"] for part in self.parts]), torch.cat([part["vectors"] for part in self.parts])

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.pt"

    def _read(self) -> None:
        """Read the parts, up to the first that is missing or unreadable, and remove all other files."""
        try:
            same_key = json.loads((self.folder / _KEY).read_bytes()) == self.key
        except (OSError, ValueError):
            same_key = False
        while same_key and (path := self._file(len(self.parts))).exists():
            try:
                self.parts.append(torch.load(path, weights_only=True))
            except (OSError, RuntimeError, EOFError, ValueError, TypeError, KeyError, pickle.UnpicklingError):
                break
        for path in self.folder.glob("*.pt*"):
            if not path.stem.isdigit() or int(path.stem) >= len(self.parts):
                path.unlink()
        if not same_key:
            self._write(self.folder / _KEY, lambda path: path.write_text(json.dumps(self.key)))

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        with refuse_failed_write(path, "the parts before it are kept"), atomic_write(path) as part:
            write(part)
