"""Write files whole or not at all: to a temporary name beside them, then moved in place. Locks between processes."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from simsiam_dali.common.errors import UserError, one_line


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; at the end of the block it becomes `path`.

    Of a symbolic link the target is written, which need not exist yet, and the link is kept. A file that is replaced
    keeps its permissions. The temporary file is hidden and of this process. If the block raises, `path` is unchanged
    and the temporary file removed. The folder of `path` must exist.
    """
    path = behind_link(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        keep_permissions(path, part)
        sync(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def behind_link(path: Path) -> Path:
    """The file that is written through `path`: where a link leads, also to nothing yet; else `path` itself."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def keep_permissions(old: Path, new: Path) -> None:
    """Give `new` the permissions of `old`, where there is such a file and the file system knows permissions."""
    with suppress(OSError):
        shutil.copymode(old, new)


@contextmanager
def refuse_failed_write(path: Path, advice: str = "") -> Iterator[None]:
    """Turn an OSError, or the RuntimeError by which torch reports one, into a UserError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        reason = (e.strerror if isinstance(e, OSError) else None) or one_line(e)
        raise UserError(f"cannot write {path} ({reason})" + (f": {advice}" if advice else "")) from e


UNFINISHED = ".unfinished-"
"""Prefix of a folder that a killed `replace_files` leaves behind."""


def refuse_unwritable(folder: Path) -> None:
    """Raise UserError unless files can be written into `folder`, which need not be there yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    # Where that is a file, or a link that leads nowhere, it fails.
    with refuse_failed_write(folder), TemporaryDirectory(dir=there, prefix=".writable-"):
        pass


def replace_files(folder: Path, files: Mapping[str, bytes], gone: Iterable[str] = ()) -> None:
    """Write files into `folder`: all are written to a hidden folder in it first, so that a failure changes nothing.

    The last file marks the set as complete: it is deleted before the others are replaced, and moved into place last.
    gone: names of files of an earlier set that this one does not have. Other files in `folder` are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # In the folder, not beside it: it may be a link to another disk, or one in a folder that is not ours to write.
    with TemporaryDirectory(dir=folder, prefix=UNFINISHED) as part:
        for name, content in files.items():
            (Path(part) / name).write_bytes(content)
        for name in (list(files)[-1], *gone):
            (folder / name).unlink(missing_ok=True)
        for name in files:
            (Path(part) / name).replace(folder / name)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, wait: bool, refusal: str = "") -> Iterator[None]:
    """Hold the lock of the file `path`, which is made where it is not there; it ends with the process.

    Raises UserError with `refusal` where another process holds it, unless `wait`.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as e:
            raise UserError(refusal) from e
        yield
