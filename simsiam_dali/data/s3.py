"""Shards on S3: DALI reads the tars there; the small files of a set are copied to a cache folder.

Server and keys are found as by AWS' tools: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_DEFAULT_REGION or a profile.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from simsiam_dali.common.errors import UserError, one_line
from simsiam_dali.common.files import atomic_write
from simsiam_dali.data.commit import MANIFEST
from simsiam_dali.data.format import read_manifest

SCHEME = "s3://"
DOWNLOADS = 16
"""Files copied at a time."""


def location(text: str) -> Path | str:
    """A command line's folder or address."""
    return text if text.startswith(SCHEME) else Path(text)


def copy_small_files(address: str) -> Path:
    """The cache folder with the set at `address`, but for its tars; another packing has another folder.

    Files that the cache holds at their full size are not copied again. Raises UserError where there is no set, a file
    of it is missing, or has another size than in the manifest.
    """
    from pyarrow import fs  # AWS' library takes a while to load, and most sets are local

    try:
        system = fs.S3FileSystem(endpoint_override=os.environ.get("AWS_ENDPOINT_URL"))
        found = system.get_file_info(fs.FileSelector(address.removeprefix(SCHEME)))
    except OSError as e:
        raise UserError(f"{address} cannot be listed ({one_line(e)})") from e
    sizes = {info.base_name: info.size for info in found if info.is_file}
    if MANIFEST not in sizes:
        raise UserError(f"no shards at {address}: put what python -m simsiam_dali.pack writes there")

    def read(name: str) -> bytes:
        try:
            with system.open_input_stream(f"{address.removeprefix(SCHEME)}/{name}") as file:
                return bytes(file.read())
        except OSError as e:
            raise UserError(f"{address}/{name} cannot be read ({one_line(e)})") from e

    def copy(name: str) -> None:
        path = folder / name
        if not path.exists() or path.stat().st_size != sizes[name]:
            with atomic_write(path) as part:
                part.write_bytes(read(name))

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "simsiam_dali" / hashlib.sha256(address.encode() + read(MANIFEST)).hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True)
    copy(MANIFEST)
    files = read_manifest(folder).files
    for name, packed in files.items():
        if sizes.get(name) != packed.bytes:
            there = f"has {sizes[name]} bytes, not {packed.bytes}" if name in sizes else "is missing"
            raise UserError(f"{address}/{name} {there}: copy the set again, with its manifest.json last")
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        list(pool.map(copy, [name for name in files if not name.endswith(".tar")]))
    return folder
