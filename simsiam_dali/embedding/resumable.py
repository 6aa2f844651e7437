"""A long computation kept in parts, so that it goes on where it was killed, and ends with the same bytes.

A folder beside the output holds `key.json`, what the parts are of, and `NNNNNN.pt`, the rows of some batches with the
loader's place after them. A part is written beside its name, flushed and renamed, so it is there whole or not at all.
"""

import fcntl
import json
import os
import pickle
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from simsiam_dali.common.errors import UserError
from simsiam_dali.data.format import Split

_KEY, _LOCK = "key.json", ".lock"


class Parts:
    """The parts in `folder`; those of another `key` are dropped. Use with `with`: another process is refused.

    Raises UserError where the folder cannot be written, or is in use.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder, self.key = folder, key
        self.rows: list[Tensor] = []  # int64 (n,), one a part
        self.vectors: list[Tensor] = []  # float32 (n, D)
        self.split: Split | None = None  # where the last part ends
        self.loader: dict[str, Any] | None = None  # the loader's state there; None at the end of the split

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def __len__(self) -> int:
        """Number of rows."""
        return sum(map(len, self.rows))

    def add(self, rows: Tensor, vectors: Tensor, split: Split, loader: dict[str, Any] | None) -> None:
        """Keep rows `(n,)` and vectors `(n, D)`, on the CPU, and the place after them (None: the end of the split)."""
        number = len(self.rows)
        self._remember(rows, vectors, split, loader)
        part = {"rows": rows, "vectors": vectors, "split": split, "loader": loader}
        self._write(self._file(number), lambda path: torch.save(part, path))

    def all(self) -> tuple[Tensor, Tensor]:
        """Everything: rows `(N,)` and vectors `(N, D)`, in the order in which it came."""
        return torch.cat(self.rows), torch.cat(self.vectors)

    def remove(self) -> None:
        """Drop the folder: what it was for is done."""
        shutil.rmtree(self.folder)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.pt"

    def _remember(self, rows: Tensor, vectors: Tensor, split: Split, loader: dict[str, Any] | None) -> None:
        self.rows.append(rows)
        self.vectors.append(vectors)
        self.split, self.loader = split, loader

    def _read(self) -> None:
        """Take up the parts that are there, up to the first that is missing or cannot be read."""
        try:
            ours = json.loads((self.folder / _KEY).read_bytes()) == self.key
        except (OSError, ValueError):
            ours = False
        if ours:
            while (path := self._file(len(self.rows))).exists():
                try:
                    self._remember(**torch.load(path, weights_only=True))
                except (OSError, RuntimeError, EOFError, ValueError, TypeError, KeyError, pickle.UnpicklingError):
                    break
        for path in self.folder.glob("*.pt*"):
            if not path.stem.isdigit() or int(path.stem) >= len(self.rows):
                path.unlink()
        if not ours:
            self._write(self.folder / _KEY, lambda path: path.write_text(json.dumps(self.key)))

    def _write(self, path: Path, write: Any) -> None:
        part = path.with_name(path.name + ".part")
        try:
            write(part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
            part.unlink(missing_ok=True)
            raise UserError(f"cannot write {path} ({' '.join(str(e).split())[:200]}); what was done is kept") from e
