"""Pack a folder of songs into the shards that training reads: python -m simsiam_dali.pack MUSIC_DIR

Run again after adding songs: only new and changed files are decoded, and no song changes its split. The old shards stay
in place until the new ones are complete, so the disk needs room for both.
"""

import argparse
import math
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path

from simsiam_dali.common.errors import UserError, one_line_errors, printable
from simsiam_dali.common.signals import raise_keyboard_interrupt
from simsiam_dali.config.cli import create_parser, whole_number
from simsiam_dali.data.format import read_manifest, verify
from simsiam_dali.packing import process_pool, ray_pool
from simsiam_dali.packing.pack import PackSettings, Report, pack
from simsiam_dali.packing.ratings import RatingsFile


def seconds(text: str) -> float:
    """An option's type: seconds above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def fraction(text: str) -> float:
    """An option's type: 0 <= fraction < 1."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 <= fraction < 1")
    return float(text)


def sample_rate(text: str) -> int | None:
    """An option's type: a rate in Hz, or None for `native`."""
    return None if text == "native" else whole_number(1)(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = create_parser("pack", __doc__)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("music_dir", metavar="MUSIC_DIR", type=Path, nargs="?", help="folder of songs; optional with --verify")
    add("--out", metavar="DIR", type=Path, default=Path("shards"), help=f"folder of the shards {default}")
    add("--sample-rate", metavar="HZ", type=sample_rate,
        help=f"sample rate of the packed audio in Hz, or native: each song's own {default}")  # fmt: skip
    add("--segment-seconds", metavar="SECONDS", type=seconds, help=f"length of a segment in seconds {default}")
    add("--codec", choices=("flac", "wav", "ogg"),
        help=f"codec of the packed audio, mono, 16 bit; ogg is Vorbis, which is lossy {default}")  # fmt: skip
    add("--val-fraction", metavar="SHARE", type=fraction,
        help=f"share of the groups (see --split-by) kept for validation, 0 to below 1 {default}")  # fmt: skip
    add("--split-by", choices=("album", "artist", "song"),
        help=f"what is kept together in training or validation {default}")  # fmt: skip
    add("--segments-per-shard", metavar="N", type=whole_number(1), help=f"segments in one tar {default}")
    add("--workers", metavar="N", type=whole_number(1), help="decoding processes (default: one for each core)")
    add("--executor", choices=("processes", "ray"), default="processes",
        help=f"where decoding runs: on this host, or on the Ray cluster of RAY_ADDRESS {default}")  # fmt: skip
    add("--seed", metavar="N", type=whole_number(0), help=f"seed of the shuffle and the split {default}")
    add("--min-seconds", metavar="SECONDS", type=seconds, help=f"refuse songs shorter than this, in seconds {default}")
    add("--ratings", metavar="FILE", type=Path,
        help="ratings that override those in the tags: a CSV with a header (rating, and path or title and artist; "
        "0..1 or 0..5), or the library database of Clementine or Strawberry, which is only read")  # fmt: skip
    add("--replace", action="store_true", help="overwrite shards of another folder, or files of the same names")
    add("--verify", action="store_true", help="verify every checksum of the shards in --out (after packing MUSIC_DIR)")
    parser.set_defaults(**asdict(PackSettings()))
    return parser


@one_line_errors
def main() -> None:
    """Pack, verify, or both."""
    parser = build_parser()
    args = parser.parse_args()
    if args.music_dir is None and not args.verify:
        parser.error("MUSIC_DIR is needed, unless --verify is given")
    raise_keyboard_interrupt()
    left = f"{args.out} is unchanged; the same command continues from here"
    try:
        if args.music_dir is not None:
            settings = PackSettings(**{field.name: getattr(args, field.name) for field in fields(PackSettings)})
            if args.executor == "ray":
                executor, workers = ray_pool.run_all, args.workers or ray_pool.cores()
            else:
                executor, workers = process_pool.run_all, args.workers or len(os.sched_getaffinity(0))
            ratings = RatingsFile.read(args.ratings, args.music_dir) if args.ratings else None
            report = pack(args.music_dir, args.out, settings, workers, ratings, args.replace, executor=executor)
            left = f"{args.out} is packed"
            summarise(report, args.out)
        if args.verify:
            left = f"{args.out} is not verified yet"
            if problems := verify(args.out):
                for problem in problems[:-1]:
                    print(f"error: {printable(problem)}", file=sys.stderr)
                raise UserError(problems[-1])
            print(f"{args.out}: all {len(read_manifest(args.out).files)} files are as they were packed")
    except KeyboardInterrupt:
        print(f"stopped: {left}", file=sys.stderr)
        sys.exit(130)


def summarise(report: Report, out: Path) -> None:
    """Print what was packed, and what was not and why."""
    for line in (*report.file_lines(out), *report.remarks):
        print(line)
    c = report.counts
    print(
        f"{c['songs']} songs, {c['seconds'] / 3600:.2f} h: {c['train_segments']} segments to train "
        f"({c['train_songs']} songs), {c['val_segments']} to validate ({c['val_songs']} songs)"
    )
    print(f"{c['duplicates']} duplicates, {c['refused']} refused, {c['passed_over']} other files ignored")
    if report.decoded_songs:
        speed = report.decoded_seconds / report.decoding_took
        print(
            f"decoded {report.decoded_songs} songs, {report.decoded_seconds / 3600:.2f} h, "
            f"in {report.decoding_took:.1f} s ({speed:.0f}x realtime)"
        )
    print(f"{out}: {'nothing has changed' if report.unchanged else 'written'}")


if __name__ == "__main__":
    main()
