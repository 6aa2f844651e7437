"""Recommend songs: python -m simsiam_dali.recommend --like SONG, --top or --explore

Reads an embedding table and prints songs: those that sound like others, the unrated ones with the highest predicted
rating, or the unrated ones whose rating would tell most. Writes them as playlists too.
"""

import argparse
import io
import os
import shlex
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from simsiam_dali.common.errors import UserError, one_line_errors, printable
from simsiam_dali.config.cli import program
from simsiam_dali.embedding import table as embeddings
from simsiam_dali.evaluation.knn import unit
from simsiam_dali.recommendation import playlists
from simsiam_dali.recommendation.library import Library, Variety
from simsiam_dali.recommendation.playlists import FORMATS, Entry
from simsiam_dali.recommendation.rating_model import MIN_RATED, Taste
from simsiam_dali.recommendation.search import SongIndex

_NAMED = 10
_ASK_FOR_MORE = 4
"""SongIndex looked for, as a multiple of the songs wanted: some are passed over for variety's sake."""


@dataclass(frozen=True)
class Choice:
    """Songs chosen, best first: `rows` of the table; `scores`, a row each, under names of `playlists.CSV_COLUMNS`."""

    rows: list[int]
    scores: dict[str, np.ndarray]
    title: str
    remarks: list[str] = field(default_factory=list)

    def note(self, i: int) -> str:
        """The scores of the i-th song for people."""
        if "similarity" in self.scores:
            return f"{self.scores['similarity'][i]:.3f}"
        return f"{self.scores['predicted_rating'][i]:.2f} ± {self.scores['std'][i]:.2f}"


def like(
    library: Library,
    x: np.ndarray,
    seeds: np.ndarray,
    candidates: np.ndarray,
    count: int,
    variety: Callable[[], Variety],
) -> Choice:
    """The songs nearest to any of the `seeds` (rows), among the rows `candidates`; `x`: all songs' unit vectors."""
    index = SongIndex(x[candidates], len(seeds))
    k, rows, cosines = count, list[int](), list[float]()
    while len(rows) < count:
        k, accept, rows, cosines = _ASK_FOR_MORE * k, variety(), [], []
        for row, cosine in zip(*index.nearest(x[seeds], k), strict=True):
            if len(rows) < count and accept(int(candidates[row])):
                rows.append(int(candidates[row]))
                cosines.append(float(cosine))
        if k >= len(candidates):
            break
    named = ", ".join(library.name(int(row)) for row in seeds[:3])
    title = f"like {named}" + (f" and {len(seeds) - 3} more" if len(seeds) > 3 else "")
    remarks = ["the search is approximate: with so many songs to compare, a few that are near may be missing"]
    return Choice(rows, {"similarity": np.array(cosines)}, title, remarks if index.approximate else [])


def learn(library: Library, x: np.ndarray) -> tuple[Taste, int]:
    """What the rated songs tell, and how many they are. Raises UserError where that is too little."""
    rating = library.table["rating"].to_numpy(float)
    rated = np.flatnonzero(np.isfinite(rating))
    if len(rated) < MIN_RATED:
        raise UserError(
            f"{len(rated)} of {len(library)} songs have a rating, to learn from them takes {MIN_RATED}: rate more, "
            "pack again with python -m simsiam_dali.pack (--ratings FILE for a player's library or a CSV), and embed "
            "again"
        )
    if np.ptp(rating[rated]) == 0:
        raise UserError(f"all {len(rated)} rated songs have the same rating, so there is nothing to learn: rate others")
    return Taste(x[rated], rating[rated]), len(rated)


def unrated(library: Library) -> np.ndarray:
    """Songs `(N,)` bool without a rating, of which no other file has one either."""
    rated = np.isfinite(library.table["rating"].to_numpy(float))
    return ~np.isin(library.recording, library.recording[rated])


def top(library: Library, x: np.ndarray, candidates: np.ndarray, count: int, accept: Variety) -> Choice:
    """The songs with the highest predicted rating among the rows `candidates`."""
    taste, n = learn(library, x)
    expected, std = taste.predict(x[candidates])
    places: list[int] = []
    for place in np.argsort(-expected, kind="stable"):
        if len(places) < count and accept(int(candidates[place])):
            places.append(int(place))
    return _rated_choice(candidates, expected, std, places, f"highest predicted ratings, learned from {n} songs")


def explore(library: Library, x: np.ndarray, candidates: np.ndarray, count: int, accept: Variety) -> Choice:
    """The songs among the rows `candidates` whose ratings would tell most."""
    taste, n = learn(library, x)
    places = taste.explore(x[candidates], count, lambda place: accept(int(candidates[place])))
    expected, std = taste.predict(x[candidates])
    return _rated_choice(candidates, expected, std, places, f"most uncertain ratings, learned from {n} songs")


def _rated_choice(
    candidates: np.ndarray, expected: np.ndarray, std: np.ndarray, places: list[int], title: str
) -> Choice:
    scores = {"predicted_rating": expected[places].clip(0, 1), "std": std[places]}
    return Choice([int(row) for row in candidates[places]], scores, title)


def choose(library: Library, vectors: np.ndarray, args: argparse.Namespace) -> Choice:
    """The songs the command line asks for. Raises UserError when none is left."""
    fits = np.ones(len(library), bool)
    if args.min_seconds is not None:
        fits &= ~(library.table["duration"].to_numpy(float) < args.min_seconds)

    def variety() -> Variety:
        return Variety(library, args.max_per_artist, args.max_per_album)

    if args.like:
        seeds = np.unique(np.concatenate([library.find(text) for text in args.like]))
        fits &= ~np.isin(library.recording, library.recording[seeds])
        for exclude, keys in ((args.exclude_same_artist, library.artists), (args.exclude_same_album, library.albums)):
            theirs = {key for row in seeds for key in keys[row]} if exclude else set()
            fits &= np.array([theirs.isdisjoint(own) for own in keys])
    else:
        if args.exclude_same_artist or args.exclude_same_album:
            raise UserError("--exclude-same-artist and --exclude-same-album go with --like")
        fits &= unrated(library)
    candidates = np.flatnonzero(fits)
    if not len(candidates):
        raise UserError(f"none of the {len(library)} songs is left to recommend: all are rated, given or excluded")
    x = unit(vectors)
    if args.like:
        return like(library, x, seeds, candidates, args.count, variety)
    return (top if args.top else explore)(library, x, candidates, args.count, variety())


def lines(library: Library, choice: Choice) -> list[str]:
    """The choice as a table for a terminal; paths are relative to the music folder."""
    head = ("", "similarity" if "similarity" in choice.scores else "rating", "artist - title", "album", "path")
    cells = [
        (
            str(i + 1),
            choice.note(i),
            cut(library.name(row), 50),
            cut(library.album[row], 30),
            printable(library.path[row]),
        )
        for i, row in enumerate(choice.rows)
    ]
    widths = [max(map(width, column)) for column in zip(head, *cells, strict=True)]
    return [
        "  ".join(cell + " " * (most - width(cell)) for cell, most in zip(row, widths, strict=True)).rstrip()
        for row in (head, *cells)
    ]


def width(text: str) -> int:
    """Columns that `text` takes on a terminal."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def cut(text: str, columns: int) -> str:
    """`text` made harmless, and cut where it takes more columns."""
    text = printable(text)
    if width(text) <= columns:
        return text
    while width(text) >= columns:
        text = text[:-1]
    return text + "…"


def entries(library: Library, choice: Choice, relative_to: Path | None) -> list[Entry]:
    """The choice for playlists, with absolute paths or paths relative to a folder."""
    made = []
    for i, row in enumerate(choice.rows):
        file = library.file(row)
        made.append(
            Entry(
                path=os.path.relpath(file, relative_to.resolve()) if relative_to else str(file),
                artist=library.artist[row],
                title=library.title[row],
                album=library.album[row],
                seconds=float(library.table["duration"].iloc[row]),
                scores={name: float(values[i]) for name, values in choice.scores.items()},
                note=f"{' '.join(name.replace('_', ' ') for name in list(choice.scores)[:1])} {choice.note(i)}",
            )
        )
    return made


def warn(what: str, paths: Sequence[str]) -> None:
    """Tell on stderr of paths, the first few by name."""
    if paths:
        more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        shown = ", ".join(p if p.isprintable() else ascii(p) for p in paths[:_NAMED])
        print(f"warning: {what}: {shown}{more}", file=sys.stderr)


def at_least(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} or more")
        return int(text)

    return number


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = argparse.ArgumentParser(
        prog=program("recommend"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--embeddings", type=Path, default=Path("embeddings.parquet"), metavar="FILE",
        help="table written by python -m simsiam_dali.embed (default: %(default)s)")  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--like", nargs="+", metavar="SONG",
        help='songs nearest to any of these; a song is a file, a folder of songs, a title or "artist - title"',
    )  # fmt: skip
    what.add_argument("--top", action="store_true", help="unrated songs with the highest predicted rating")
    what.add_argument(
        "--explore", action="store_true", help="unrated songs whose rating is most uncertain, to rate next"
    )
    add("--count", type=at_least(1), default=25, metavar="N", help="songs to list (default: %(default)s)")
    for kind in ("artist", "album"):
        add(f"--max-per-{kind}", type=at_least(1), metavar="N", help=f"at most N songs of one {kind} (default: any)")
    for kind in ("artist", "album"):
        add(f"--exclude-same-{kind}", action="store_true", help=f"with --like: no song of the given songs' {kind}s")
    add("--min-seconds", type=float, metavar="S", help="leave out songs shorter than S seconds (default: none)")
    add("--xspf", type=Path, metavar="FILE", help="write them as an XSPF playlist")
    add("--m3u8", type=Path, metavar="FILE", help="write them as an M3U8 playlist")
    add("--csv", type=Path, metavar="FILE", help="write them as a CSV table")
    add("--relative-to", type=Path, metavar="DIR", help="paths in these files relative to DIR (default: absolute)")
    add("--music", type=Path, metavar="DIR", help="the music folder (default: the one that was packed)")
    add("--replace", action="store_true", help="write over files that are no playlists of this command")
    return parser


def run(args: argparse.Namespace) -> None:
    """What the command does."""
    outputs = {name: path for name in FORMATS if (path := getattr(args, name)) is not None}
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        raise UserError("two playlists would be written to one file: choose a file for each")
    for path in outputs.values():
        playlists.check_writable(path, args.replace)
    songs = embeddings.read_songs(args.embeddings)
    library = Library(songs.table, (args.music or Path(songs.about.get("music", ""))).resolve())
    choice = choose(library, songs.vectors, args)
    print(f"{len(choice.rows)} of {len(library)} songs: {printable(choice.title)}\n")
    print("\n".join([*lines(library, choice), *choice.remarks]))
    if not outputs:
        return
    warn("not where they were, is --music another folder now?",
         [str(file) for row in choice.rows if not (file := library.file(row)).exists()])  # fmt: skip
    made = entries(library, choice, args.relative_to)
    for name, path in outputs.items():
        text, left_out = FORMATS[name](made, choice.title)
        playlists.write(path, text)
        print(f"wrote {shlex.quote(str(path))}")
        warn(f"left out of {path}, since it cannot hold such a path (XSPF can)", left_out)


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 still shows the rest
    run(args)


if __name__ == "__main__":
    main()
