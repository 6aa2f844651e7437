"""Replace files of several folders as one set: after a kill at any moment, all of them are the old ones or the new.

No file system exchanges several files in one step. So each new file is first written, and synced to the disk, under a
hidden name beside its target. One rename then creates a journal that lists them: this commits the set. Moving the files
to their names can be repeated, and is finished by whichever command reads the set next (`finish_commit`). Until a
reader of ours has come, a program that knows nothing of the journal may see some of the files moved and others not.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import behind_link, keep_permissions, locked, sync

_SUFFIX = "staged"


class Replacement:
    """Files that take the place of others together; use with `with`, which holds a lock.

    owner: the file of the set that its journal and its lock are named after. folders: where other files of the set may
    lie, on any file system. What an earlier, killed replacement has committed is finished first, and what it has not is
    removed (in the folder that a link leads to, once a file is staged there again). Nothing is replaced unless `commit`
    is called. Raises UserError while another process holds the lock.
    """

    def __init__(self, owner: Path, folders: Iterable[Path] = ()) -> None:
        self.owner, self._folders = owner, {owner.parent, *folders}
        self._targets: list[Path] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.owner.parent.mkdir(parents=True, exist_ok=True)
        with self._stack:
            self._stack.enter_context(_locked(self.owner, wait=False))
            _roll_forward(self.owner)
            self._discard()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            self._discard()

    def stage(self, target: Path) -> Path:
        """The path at which to write what `commit` moves to `target`, in the same folder.

        A link stays, and what it leads to is the target. A file that is replaced keeps its permissions.
        """
        target = behind_link(target)
        self._folders.add(target.parent)
        self._targets.append(target)
        return self._staged(target)

    def drop(self, target: Path) -> None:
        """Leave a staged target as it is."""
        target = behind_link(target)
        self._targets.remove(target)
        self._staged(target).unlink()

    def commit(self) -> None:
        """Replace every staged target. After an OSError nothing is replaced, or the rest follows later."""
        if not self._targets:
            return
        for target in self._targets:
            keep_permissions(target, self._staged(target))
            sync(self._staged(target))
        names = [[_relative(path, self.owner) for path in (self._staged(t), t)] for t in self._targets]
        for folder in {target.parent for target in self._targets}:
            sync(folder)
        journal = _journal(self.owner)
        self._staged(journal).write_text(json.dumps({"files": names}))
        sync(self._staged(journal))
        self._staged(journal).replace(journal)
        sync(self.owner.parent)
        self._targets = []
        _roll_forward(self.owner)

    def _staged(self, target: Path) -> Path:
        return target.with_name(f".{target.name}.{self.owner.name}.{_SUFFIX}")

    def _discard(self) -> None:
        # In the whole folder, since a killed process cannot tell what it had staged. An unfinished commit needs them.
        if not _journal(self.owner).exists():
            for folder in self._folders:
                for path in folder.glob(".*"):
                    if f".{self.owner.name}.{_SUFFIX}" in path.name:  # also what an atomic write of one has left
                        path.unlink()


def finish_commit(owner: Path) -> None:
    """Finish the replacement of the set of `owner` that another process has committed, if there is one.

    Raises UserError where that fails.
    """
    if _journal(owner).exists():
        try:
            with _locked(owner, wait=True):
                _roll_forward(owner)
        except OSError as e:
            raise UserError(f"{owner}: a refresh was interrupted and cannot be finished: {e}") from e


def _roll_forward(owner: Path) -> None:
    """Move the files that the journal names to their places, those that are not there already. Needs the lock."""
    journal = _journal(owner)
    if not journal.exists():
        return
    try:
        moves = [
            (owner.parent / staged, owner.parent / target)
            for staged, target in json.loads(journal.read_bytes())["files"]
        ]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{journal} is damaged: a refresh was interrupted; remove this file and refresh again") from e
    for staged, target in moves:
        with contextlib.suppress(FileNotFoundError):  # moved before a kill
            staged.replace(target)
    for folder in {target.parent for _, target in moves}:
        sync(folder)
    journal.unlink()
    sync(owner.parent)


def _locked(owner: Path, wait: bool) -> contextlib.AbstractContextManager[None]:
    busy = f"another refresh of {owner} is running: wait until it ends"
    return locked(owner.with_name(f".{owner.name}.lock"), wait, busy)


def _journal(owner: Path) -> Path:
    return owner.with_name(f".{owner.name}.commit")


def _relative(path: Path, owner: Path) -> str:
    """From the owner's folder, so that the set may be moved as a whole before it is finished."""
    # Links resolved: ".." behind one does not lead back to where it lies.
    return os.path.relpath(path.parent.resolve() / path.name, owner.parent.resolve())
