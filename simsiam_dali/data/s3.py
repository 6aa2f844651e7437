"""Shards on S3: DALI reads the tars there; the small files of a set are copied to a cache folder.

Server and keys are found as by AWS' tools: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_DEFAULT_REGION or a profile.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from simsiam_dali.common.errors import UserError, one_line
from simsiam_dali.common.files import atomic_write

SCHEME = "s3://"
DOWNLOADS = 16
"""Files copied at a time."""


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
            raise UserError(f"{address} cannot be listed ({one_line(e)})") from e
        self.sizes = {info.base_name: info.size for info in found if info.is_file}

    def read(self, name: str) -> bytes:
        """The content of a file."""
        try:
            with self._system.open_input_stream(f"{self.address.removeprefix(SCHEME)}/{name}") as file:
                return bytes(file.read())
        except OSError as e:
            raise UserError(f"{self.address}/{name} cannot be read ({one_line(e)})") from e

    def folder(self, manifest: bytes) -> Path:
        """The cache folder of the set that has this manifest: another packing has another."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "simsiam_dali" / hashlib.sha256(self.address.encode() + manifest).hexdigest()[:20]

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Copy the files that the cache does not hold at their full size."""

        def copy(path: Path) -> None:
            if not path.exists() or path.stat().st_size != self.sizes.get(path.name):
                with atomic_write(path) as part:
                    part.write_bytes(self.read(path.name))

        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            list(pool.map(copy, [folder / name for name in names]))
