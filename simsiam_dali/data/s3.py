"""Shards on S3: DALI reads the tars there; the small files of a set are copied to a cache folder.

Server and keys are found as by AWS' tools: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_DEFAULT_REGION or a profile.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeGuard

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import atomic_write

SCHEME = "s3://"
DOWNLOADS = 16
"""Files copied at a time."""


def is_address(place: Path | str) -> TypeGuard[str]:
    """Whether a place is on S3."""
    return isinstance(place, str) and place.startswith(SCHEME)


def place(text: str) -> Path | str:
    """A command line's folder or address."""
    return text if text.startswith(SCHEME) else Path(text)


class Remote:
    """The files under an address. Raises UserError where it cannot be listed."""

    def __init__(self, address: str) -> None:
        from pyarrow import fs  # AWS' library takes a while to load, and most sets are local

        self.address = address.rstrip("/")
        try:
            self._system = fs.S3FileSystem(endpoint_override=os.environ.get("AWS_ENDPOINT_URL"))
            found = self._system.get_file_info(fs.FileSelector(self.address.removeprefix(SCHEME)))
        except OSError as e:
            raise UserError(f"{address} cannot be listed ({' '.join(str(e).split())[:300]})") from e
        self.sizes = {info.base_name: info.size for info in found if info.is_file}

    def read(self, name: str) -> bytes:
        """The content of a file."""
        try:
            with self._system.open_input_stream(f"{self.address.removeprefix(SCHEME)}/{name}") as file:
                return bytes(file.read())
        except OSError as e:
            raise UserError(f"{self.address}/{name} cannot be read ({' '.join(str(e).split())[:300]})") from e

    def folder(self, manifest: bytes) -> Path:
        """The cache folder of the set that has this manifest: another packing has another."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "simsiam_dali" / hashlib.sha256(self.address.encode() + manifest).hexdigest()[:20]

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Copy the files that the cache does not hold at their full size."""

        def copy(name: str) -> None:
            with atomic_write(folder / name) as path:
                path.write_bytes(self.read(name))

        def is_cached(name: str) -> bool:
            path = folder / name
            return path.exists() and path.stat().st_size == self.sizes.get(name)

        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            list(pool.map(copy, [name for name in names if not is_cached(name)]))
