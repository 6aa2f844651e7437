"""Recordings that a library holds more than once: found by the embeddings, and confirmed from the audio.

A pair of files is a candidate where the embeddings are similar and the lengths differ by little; it is confirmed by
the audio fingerprints, since different songs may be as similar to an encoder as two copies of one. The files are only
read.
"""

import contextlib
import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from simsiam_dali.common.errors import printable
from simsiam_dali.common.table import table_lines
from simsiam_dali.packing.encoding import Encoding
from simsiam_dali.packing.process_pool import Died, run_all
from simsiam_dali.recommendation.fingerprint import MAX_LAG, MIN_OVERLAP, Match, compare, read_fingerprint
from simsiam_dali.recommendation.library import Library
from simsiam_dali.recommendation.playlists import DUPLICATE_COLUMNS, one_line, player_path, truncate

MIN_COSINE = 0.4
"""Cosine of standardised embeddings from which a pair is a candidate: some MP3s of 64 kbit/s are no nearer."""
NEAREST = 20
"""A pair is a candidate where one is among so many nearest of the other, of like length: bounds the work."""
_BLOCK = 1024


@dataclass(frozen=True)
class Copy:
    """One file of a recording: its row in the library, its encoding, its decoded length in seconds."""

    row: int
    encoding: Encoding
    seconds: float

    @property
    def rank(self) -> tuple[bool, int, float]:
        """To sort copies by, best first: lossless, then the bit rate, then the length."""
        return not self.encoding.is_lossless, -self.encoding.bit_rate, -self.seconds


@dataclass(frozen=True)
class Duplicates:
    """groups: the copies of each recording, best first; matches: of each pair of rows that was compared, lower first.

    unread: songs that could not be decoded, with the reason.
    """

    groups: list[list[Copy]]
    matches: dict[tuple[int, int], Match]
    unread: dict[int, str]


def candidate_pairs(x: np.ndarray, seconds: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Pairs of `rows (R,)`, `(P, 2)`, the lower first, which may be one recording by vector and length.

    Each song with at most `NEAREST` others that are nearest to it. x: unit vectors `(N, D)` of all songs, not whitened;
    seconds `(N,)`: their lengths, NaN = unknown, which is in no pair.
    """
    rows = rows[np.argsort(seconds[rows], kind="stable")]
    rows = rows[np.isfinite(seconds[rows])]
    length, pairs = seconds[rows], [np.empty((0, 2), np.int64)]
    longest = np.minimum(length + 2 * MAX_LAG, length / MIN_OVERLAP)  # that a copy of each can be
    for start in range(0, len(rows), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(rows)))
        # Sorted by length, the songs that may be copies of a block's are a slice.
        first = np.searchsorted(longest, length[start])
        other = np.arange(first, np.searchsorted(length, longest[block[-1]], side="right"))
        cosine = x[rows[block]] @ x[rows[other]].T
        fits = (length[other] <= longest[block, None]) & (length[block, None] <= longest[other])
        cosine[~fits | (block[:, None] == other)] = -np.inf
        near = np.argpartition(-cosine, min(NEAREST, len(other)) - 1, axis=1)[:, :NEAREST]
        i, column = np.nonzero(np.take_along_axis(cosine, near, axis=1) >= MIN_COSINE)
        pairs.append(np.column_stack([rows[block[i]], rows[other[near[i, column]]]]))
    return np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0)


def find_duplicates(library: Library, x: np.ndarray, rows: np.ndarray, workers: int) -> Duplicates:
    """The recordings of which `rows (R,)` of the library hold several files.

    x: unit vectors `(N, D)` of all its songs. Candidates' files are decoded by `workers` processes.
    """
    pairs = candidate_pairs(x, library.table["duration"].to_numpy(float), rows)
    files = {library.file(row): row for row in np.unique(pairs).tolist()}
    read, unread = {}, dict[int, str]()
    with contextlib.closing(run_all(read_fingerprint, files, workers)) as results:
        for path, result in tqdm(results, total=len(files), desc="decoded", unit="song", disable=not files):
            if isinstance(result, Died):
                unread[files[path]] = f"the decoder crashed (exit code {result.exit_code})"
            elif isinstance(result, str):
                unread[files[path]] = result
            else:
                read[files[path]] = result
    both = [(a, b) for a, b in pairs.tolist() if a in read and b in read]
    shown = tqdm(both, desc="compared", unit="pair", disable=not both)
    matches = {(a, b): compare(read[a].fingerprint, read[b].fingerprint) for a, b in shown}
    same = np.array([pair for pair, match in matches.items() if match.is_same_recording], int).reshape(-1, 2)
    graph = coo_array((np.ones(len(same), bool), (same[:, 0], same[:, 1])), shape=(len(library), len(library)))
    number = connected_components(graph, directed=False)[1]
    groups: dict[int, list[Copy]] = {}
    for row in np.unique(same).tolist():
        groups.setdefault(int(number[row]), []).append(Copy(row, read[row].encoding, read[row].seconds))
    ordered = [sorted(group, key=lambda copy: (copy.rank, library.path[copy.row])) for group in groups.values()]
    return Duplicates(ordered, matches, dict(sorted(unread.items())))


def duplicates_table(library: Library, found: Duplicates) -> list[str]:
    """The groups as a table for a terminal."""
    rows = [
        (
            str(number) if i == 0 else "",
            copy.encoding.codec,
            str(copy.encoding.bit_rate),
            f"{copy.seconds:.1f}",
            truncate(library.name(copy.row), 50),
            printable(library.path[copy.row]),
        )
        for number, group in enumerate(found.groups, 1)
        for i, copy in enumerate(group)
    ]
    return table_lines(("", "codec", "kbit/s", "seconds", "artist - title", "path"), rows)


def duplicates_csv(
    library: Library, x: np.ndarray, found: Duplicates, relative_to: Path | None, prefix: str | None
) -> str:
    """The groups as CSV, a row a file; `x`: unit vectors `(N, D)`, paths as in `playlists.playlist_entries`.

    similarity, bit_errors and lag_seconds compare a copy with the first of its group; the latter two are empty where
    the pair was not compared. Bytes of a path that are not UTF-8 are written as \\xNN.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, DUPLICATE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for number, rank, copy, first in _copies(found.groups):
        row, encoding = copy.row, copy.encoding
        pair = found.matches.get((min(row, first.row), max(row, first.row)))
        lag = None if pair is None else pair.lag if first.row < row else -pair.lag
        file = os.fsencode(player_path(library.file(row), library.music, relative_to, prefix))
        values = (
            number, rank, encoding.codec, encoding.bit_rate, f"{copy.seconds:.1f}", f"{x[row] @ x[first.row]:.4f}",
            "" if pair is None else f"{pair.bit_errors:.4f}", "" if lag is None else f"{lag:.2f}",
            one_line(library.artist[row]), one_line(library.title[row]),
            file.decode("utf-8", "backslashreplace"),
        )  # fmt: skip
        writer.writerow(dict(zip(DUPLICATE_COLUMNS, values, strict=True)))
    return out.getvalue()


def _copies(groups: Sequence[Sequence[Copy]]) -> Iterator[tuple[int, int, Copy, Copy]]:
    """The group's number, the copy's rank in it, both from 1, the copy, and the first copy of the group."""
    for number, group in enumerate(groups, 1):
        for rank, copy in enumerate(group, 1):
            yield number, rank, copy, group[0]
