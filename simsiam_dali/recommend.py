"""Recommend songs: python -m simsiam_dali.recommend --like SONG, --path FROM TO, --radio SONG, --top, --explore

Reads an embedding table and prints songs: those that sound like others, those that lead from one song to another in
even steps, a varied order around one song, the unrated ones with the highest predicted rating, or the unrated ones
whose rating would be most informative. Writes them as playlists too, which can be made again from a newer table.
--duplicates lists the recordings that the library holds more than once.
"""

import argparse
import dataclasses
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simsiam_dali.common.errors import UserError, one_line_errors, printable
from simsiam_dali.config.cli import add_embeddings, create_parser, whole_number
from simsiam_dali.embedding.records import read_same_audio
from simsiam_dali.embedding.table import read_song_embeddings
from simsiam_dali.evaluation.knn import unit
from simsiam_dali.recommendation.choose import Request, choose, fitting, named
from simsiam_dali.recommendation.duplicates import duplicates_csv, duplicates_table, find_duplicates
from simsiam_dali.recommendation.library import Library
from simsiam_dali.recommendation.playlists import (
    FORMATS,
    check_writable,
    playlist_entries,
    terminal_table,
    write_playlist,
)
from simsiam_dali.recommendation.saved import check_name, save

_NAMED = 10
LEFT_OUT = "left out of {}, since it cannot hold such a path (XSPF can)"


def warn(problem: str, paths: Sequence[str]) -> None:
    """Print on stderr that paths have a problem, with the first few paths."""
    if paths:
        more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        shown = ", ".join(p if p.isprintable() else ascii(p) for p in paths[:_NAMED])
        print(f"warning: {problem}: {shown}{more}", file=sys.stderr)


def year_range(text: str) -> tuple[int, int]:
    """The first and the last year of "1994" or "1990-1999"."""
    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    first, last = (int(year) for year in (found[1], found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise argparse.ArgumentTypeError(f"expected a year, or two such as 1990-1999, not {text!r}")
    return first, last


def rating(text: str) -> float:
    """A rating from 0 to 1. Raises ValueError for anything else."""
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = create_parser("recommend", __doc__)
    add_embeddings(parser)
    add, default = parser.add_argument, Request()
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--like", nargs="+", metavar="SONG",
        help='songs nearest to any of these; a song is a file, a folder of songs, a title or "artist - title"',
    )  # fmt: skip
    mode.add_argument(
        "--path",
        nargs=2,
        metavar=("FROM", "TO"),
        help="songs that lead from one song to another, --count in all, 3 or more",
    )
    mode.add_argument("--radio", metavar="SONG", help="songs around one song, in a random order that drifts slowly")
    mode.add_argument("--top", action="store_true", help="unrated songs with the highest predicted rating")
    mode.add_argument(
        "--explore", action="store_true", help="unrated songs whose rating is most uncertain, to rate next"
    )
    mode.add_argument(
        "--duplicates", action="store_true",
        help="recordings of which there are several files, compared by their audio; the best file first",
    )  # fmt: skip
    add("--unlike", nargs="+", metavar="SONG", help="with --like: songs that are not near any of these")
    add("--count", type=whole_number(1), default=default.count, metavar="N",
        help="songs to list (default: %(default)s)")  # fmt: skip
    add("--seed", type=whole_number(0), default=default.seed, metavar="N",
        help="random seed of --radio's order (default: %(default)s)")  # fmt: skip
    for kind in ("artist", "album"):
        add(
            f"--max-per-{kind}", type=whole_number(1), metavar="N", help=f"at most N songs of one {kind} (default: any)"
        )
    for kind in ("artist", "album"):
        add(
            f"--exclude-same-{kind}",
            action="store_true",
            help=f"with --like, --path or --radio: no other song of the given songs' {kind}s",
        )
    add("--min-seconds", type=float, metavar="S", help="leave out songs shorter than S seconds (default: none)")
    add("--year", type=year_range, metavar="Y[-Y]", help="only songs of a year, or of years such as 1990-1999")
    add("--genre", metavar="NAME", help="only songs of a genre")
    add(
        "--min-rating",
        type=rating,
        metavar="R",
        help="with --like, --path or --radio: only songs rated at least R, 0 to 1",
    )
    add("--xspf", type=Path, metavar="FILE", help="write them as an XSPF playlist")
    add("--m3u8", type=Path, metavar="FILE", help="write them as an M3U8 playlist")
    add("--csv", type=Path, metavar="FILE", help="write them, or the duplicates, as a CSV table")
    add("--save", metavar="NAME", help="write NAME.m3u8, NAME.xspf, and NAME.json, from which refresh remakes them")
    add("--playlists", type=Path, default=Path("playlists"), metavar="DIR", help="where to save (default: %(default)s)")
    paths = parser.add_mutually_exclusive_group()
    paths.add_argument("--relative-to", type=Path, metavar="DIR",
        help="write paths relative to DIR (default: absolute; with --save, relative to --playlists)")  # fmt: skip
    paths.add_argument("--path-prefix", metavar="PREFIX",
        help="write paths that begin with PREFIX, the music folder as the player sees it, such as /mnt/music"
    )  # fmt: skip
    add("--music", type=Path, metavar="DIR", help="the music folder (default: the one that was packed)")
    add(
        "--replace",
        action="store_true",
        help="overwrite files that this command did not write, or another playlist saved as NAME",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Choose songs, print them and write the playlists."""
    outputs = {name: path for name in FORMATS if (path := getattr(args, name)) is not None}
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        raise UserError("two playlists would be written to one file: choose a file for each")
    for path in outputs.values():
        check_writable(path, args.replace)
    if args.save is not None:
        check_name(args.save)
    songs = read_song_embeddings(args.embeddings)
    same_audio = read_same_audio(args.embeddings, songs.provenance.get("shards", ""), songs.table["path"])
    library = Library(songs.table, (args.music or Path(songs.provenance.get("music", ""))).resolve(), same_audio)
    names = {field.name for field in dataclasses.fields(Request)} - {"songs"}
    request = Request(**{name: getattr(args, name) for name in names})
    if args.duplicates:
        list_duplicates(args, library, songs.vectors, request)
        return
    x = songs.unit()
    choice = choose(library, x, request)
    for note in filter(None, (library.note(name, option) for name, option in named(request))):
        print(printable(note))
    print(f"{len(choice.rows)} of {len(library)} songs: {printable(choice.title)}\n")
    print("\n".join(terminal_table(library, choice)))
    if not outputs and args.save is None:
        return
    missing = [str(file) for row in choice.rows if not (file := library.file(row)).exists()]
    warn("files that are missing (does --music name another folder now?)", missing)
    entries = playlist_entries(library, choice, args.relative_to, args.path_prefix)
    for name, path in outputs.items():
        text, left_out = FORMATS[name](entries, choice.title)
        write_playlist(path, text)
        print(f"wrote {shlex.quote(str(path))}")
        warn(LEFT_OUT.format(path), left_out)
    if args.save is not None:
        written = save(
            args.playlists, args.save, request, library, x, table=args.embeddings,
            relative_to=args.relative_to, prefix=args.path_prefix, replace=args.replace,
        )  # fmt: skip
        print(f"wrote {', '.join(shlex.quote(str(path)) for path in written.files)}")
        warn(LEFT_OUT.format(written.files[1]), written.left_out)


def list_duplicates(args: argparse.Namespace, library: Library, vectors: np.ndarray, request: Request) -> None:
    """Print the recordings that are there more than once, and write the CSV table."""
    default, used = Request(), {"min_seconds", "year", "genre"}
    unused = [field.name for field in dataclasses.fields(Request) if field.name not in used]
    given = [name for name in unused if getattr(request, name) != getattr(default, name)]
    given += [name for name in ("xspf", "m3u8", "save") if getattr(args, name) is not None]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} does not go with --duplicates")
    # Not whitened: the least cosine of two copies was measured so.
    x, rows = unit(vectors, whiten=False), np.flatnonzero(fitting(library, request))
    found = find_duplicates(library, x, rows, len(os.sched_getaffinity(0)))
    for row, reason in found.unread.items():
        warn(f"not compared: {reason}", [library.path[row]])
    files = sum(map(len, found.groups))
    print(f"{len(found.groups)} recordings are there more than once, in {files} of {len(rows)} files\n")
    print("\n".join(duplicates_table(library, found)))
    if args.csv:
        write_playlist(args.csv, duplicates_csv(library, x, found, args.relative_to, args.path_prefix))
        print(f"wrote {shlex.quote(str(args.csv))}")


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 still shows the rest
    run(args)


if __name__ == "__main__":
    main()
