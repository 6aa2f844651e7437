"""Where the songs lie on the page's map: principal components at once, and UMAP once another process has computed it.

UMAP of 100,000 songs takes minutes. It is kept beside the table as `.NAME.map.npz`, with the sha256 of the table's
file, so that it is computed once for a table. The process ends with the one that started it, however that ends.
"""

import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import numpy as np

from simsiam_dali.common.errors import printable
from simsiam_dali.common.files import atomic_write, sha256_of

MIN_SONGS = 10
"""Of fewer songs there is no UMAP, as in evaluation.maps."""
_SONGS, _NUMBERS = 20_000, 2**22
"""The most songs, and numbers of their vectors, that the principal components are computed from."""
_BLOCK = 2048
_KEY = "simsiam_dali_table_sha256"


def principal_components(vectors: np.ndarray) -> np.ndarray:
    """The first two principal components `(N, 2)` of standardised vectors `(N, D)` of length 1, in -1..1.

    Not of the unit vectors by which songs are searched, which take seconds: the page shows these until UMAP is there.
    """
    songs, dims = vectors.shape
    some = vectors[:: -(-songs // max(2, min(_SONGS, _NUMBERS // dims)))].astype(np.float32)
    mean, std = some.mean(axis=0), some.std(axis=0)

    def standardised(own: np.ndarray) -> np.ndarray:
        own = (own - mean) / np.where(std > 0, std, 1)
        return own / np.linalg.norm(own, axis=1, keepdims=True).clip(min=1e-12)

    x = standardised(some)
    axes = _principal_axes(x - x.mean(axis=0)) if len(x) > 1 else x.T
    blocks = np.array_split(vectors, -(-len(vectors) // _BLOCK))  # small ones stay in the cache
    flat = np.concatenate([standardised(block) @ axes for block in blocks])
    return scaled_to_one(np.pad(flat, ((0, 0), (0, 2 - flat.shape[1]))))


def _principal_axes(x: np.ndarray) -> np.ndarray:
    """The first two principal axes `(D, 2)`, or `(D, 1)` of one dimension, of centred `(N, D)`."""
    songs, dims = x.shape
    if songs < dims:  # the rows' Gram matrix is smaller than the covariance, and has the same eigenvalues
        axes = x.T @ np.linalg.eigh(x @ x.T)[1][:, :-3:-1]
        length = np.linalg.norm(axes, axis=0)
        return axes / length.clip(min=max(1e-4 * length[0], 1e-12))  # the second may be rounding errors only
    return np.linalg.eigh(x.T @ x)[1][:, :-3:-1]


def scaled_to_one(points: np.ndarray) -> np.ndarray:
    """`(N, 2)` float32, centred and scaled into -1..1 by one factor for both axes."""
    low, high = points.min(axis=0), points.max(axis=0)
    return ((points - (low + high) / 2) / max(float((high - low).max()) / 2, 1e-9)).astype(np.float32)


class Positions:
    """The best positions there are: `points` `(N, 2)` float32 in -1..1, made by `kind`.

    `version` grows with each change; `computing`: whether a better one is being made.
    """

    def __init__(self, table: Path, vectors: np.ndarray) -> None:
        self._table, self._songs = table, len(vectors)
        self._file = table.with_name(f".{table.name}.map.npz")
        self._process: subprocess.Popen[str] | None = None
        self._closed, self._lock = False, threading.Lock()
        self.computing = False
        self.version = 1
        self._key = sha256_of(table)
        kept = _read(self._file, self._key, self._songs)
        self.kind = "PCA" if kept is None else "UMAP"
        self.points = principal_components(vectors) if kept is None else kept

    def compute(self) -> None:
        """Compute UMAP in the background, where it is not there already; nothing after `close`."""
        if self.kind == "UMAP" or self._songs < MIN_SONGS or self.computing or self._closed:
            return
        self.computing = True
        threading.Thread(target=self._compute, daemon=True).start()

    def _compute(self) -> None:
        with tempfile.TemporaryDirectory(prefix="simsiam-dali-map-") as scratch:
            out = Path(scratch) / "map.npz"
            command = [sys.executable, "-m", "simsiam_dali.serving.umap_process", str(self._table), str(out)]
            pipe = subprocess.PIPE
            # In a session of its own, Ctrl-C does not reach it; it ends when its standard input is closed.
            with self._lock:
                if self._closed:
                    return
                process = subprocess.Popen(command, stdin=pipe, stderr=pipe, text=True, start_new_session=True)
                self._process = process
            assert process.stderr is not None
            last = (process.stderr.read().strip().splitlines() or [""])[-1]
            if process.wait() and not self._closed:
                print(f"warning: no UMAP, the map stays as it is: {printable(last)}", file=sys.stderr)
            points = _read(out, self._key, self._songs)
        if points is not None:
            self.points, self.kind, self.version = points, "UMAP", self.version + 1
            self._keep(points)
        self.computing = False

    def _keep(self, points: np.ndarray) -> None:
        """Keep the map for the next start, where its folder can be written and the file is ours or not there."""
        try:
            write_map(self._file, points, self._key)
        except OSError as e:
            print(f"warning: the map is not kept for the next start ({e.strerror}): {self._file}", file=sys.stderr)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._closed = True
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def write_map(path: Path, points: np.ndarray, key: str) -> None:
    """Write a map atomically. Raises OSError, also where a file that is no map has its name."""
    if path.exists() and not _is_map(path):
        raise FileExistsError(None, "another file has that name")
    with atomic_write(path) as part, part.open("wb") as file:
        np.savez(file, points=points, simsiam_dali_table_sha256=np.array(key))


def _is_map(path: Path) -> bool:
    try:
        with np.load(path) as content:
            return _KEY in content
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _read(path: Path, key: str, songs: int) -> np.ndarray | None:
    """The positions of a map that is of this table; None where there is none, or one of another table."""
    if not path.exists() or not _is_map(path):
        return None
    with np.load(path) as content:
        points: np.ndarray = content["points"]
        return points if str(content[_KEY]) == key and points.shape == (songs, 2) else None
