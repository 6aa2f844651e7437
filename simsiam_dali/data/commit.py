"""Replace a whole shard set atomically: a kill at any moment leaves the old set or the new one.

The new set is staged in `.packing/new/`. One rename to `.commit` commits it; the rest (moving the files to their plain
names, removing those that only the old manifest names) can be repeated by the next process, because the manifest moves
last. Files that no manifest names are never touched.
"""

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import locked, sync

MANIFEST = "manifest.json"
STAGING = ".packing"
_COMMIT = ".commit"
_LOCK = ".lock"


def lock_set(root: Path, wait: bool) -> AbstractContextManager[None]:
    """Hold the set's lock, which ends with the process. Without `wait`, raises UserError if another holds it."""
    return locked(root / _LOCK, wait, f"another pack is writing to {root}: wait until it ends")


def commit(root: Path, staged: Path) -> None:
    """Replace the set of `root` by the complete set in `staged`, synced and on the same disk. Needs the lock."""
    sync(staged)
    staged.rename(root / _COMMIT)
    sync(root)
    roll_forward(root)


def finish_commit(root: Path) -> None:
    """Finish a replacement that another process began, if there is one."""
    if (root / _COMMIT).exists():
        try:
            with lock_set(root, wait=True):
                roll_forward(root)
        except OSError as e:
            raise UserError(f"{root}: a replacement of the shards was interrupted and cannot be finished: {e}") from e


def roll_forward(root: Path) -> None:
    """Move a committed set to its place, continuing an interrupted move. Needs the lock."""
    source = root / _COMMIT
    if not source.exists():
        return
    if (source / MANIFEST).exists():  # else it has moved already, being the last file
        new = set(named_files(source))
        for path in source.iterdir():
            if path.name != MANIFEST:
                path.replace(root / path.name)
        for name in set(named_files(root)) - new:
            (root / name).unlink(missing_ok=True)
        sync(root)
        (source / MANIFEST).replace(root / MANIFEST)
    source.rmdir()
    sync(root)
    shutil.rmtree(root / STAGING, ignore_errors=True)  # its decoded songs are in the set now


def named_files(folder: Path) -> list[str]:
    """The files that the manifest in `folder` names, whatever its version; none without a readable one."""
    try:
        names = json.loads((folder / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    # A damaged manifest must not lead out of its folder.
    return [name for name in names if isinstance(name, str) and Path(name).name == name]
