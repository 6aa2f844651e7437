"""Pack a folder of songs into WebDataset shards: `simsiam-dali pack music/` or `python tools/make_shards.py music/`."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.common.signals import raise_keyboard_interrupt
from simsiam_dali.config.cli import program
from simsiam_dali.data.format import read_manifest, verify
from simsiam_dali.packing import process_pool, ray_pool
from simsiam_dali.packing.pack import PackSettings, Report, pack


def _number(kind: type[int] | type[float], rule: str, accepts: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: a number that `accepts`."""

    def number(text: str) -> int | float:
        if not accepts(kind(text)):
            raise argparse.ArgumentTypeError(f"{text} is not {rule}")
        return kind(text)

    return number


_count = _number(int, "at least 1", lambda n: n >= 1)
_seed = _number(int, "at least 0", lambda n: n >= 0)
_positive = _number(float, "above 0", lambda x: 0 < x < math.inf)
_fraction = _number(float, "in 0 <= fraction < 1", lambda x: 0 <= x < 1)


def _sample_rate(text: str) -> int | None:
    return None if text == "native" else int(_count(text))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("pack"),
        description=(
            "Pack every song below MUSIC_DIR into the shards that training reads. Run again after adding songs: "
            "only new and changed files are decoded, and no song changes its split. The old shards stay in place "
            "until the new ones are complete, so the disk needs room for both."
        ),
    )
    add = parser.add_argument
    default = "(default: %(default)s)"
    add("music_dir", metavar="MUSIC_DIR", type=Path, nargs="?", help="folder of songs; optional with --verify")
    add("--out", metavar="DIR", type=Path, default=Path("shards"), help=f"folder of the shards {default}")
    add(
        "--sample-rate",
        metavar="HZ",
        type=_sample_rate,
        default=16000,
        help=f"sample rate of the packed audio in Hz, or native: each song's own {default}",
    )
    add(
        "--segment-seconds",
        metavar="SECONDS",
        type=_positive,
        default=60.0,
        help=f"length of a segment in seconds {default}",
    )
    add(
        "--codec",
        choices=("flac", "wav", "ogg"),
        default="flac",
        help=f"of the packed audio, mono, 16 bit; ogg is Vorbis and loses a little {default}",
    )
    add(
        "--val-fraction",
        metavar="SHARE",
        type=_fraction,
        default=0.1,
        help=f"share of the groups (see --split-by) kept for validation, 0 to below 1 {default}",
    )
    add(
        "--split-by",
        choices=("album", "artist", "song"),
        default="album",
        help=f"what is kept together in training or validation {default}",
    )
    add("--segments-per-shard", metavar="N", type=_count, default=256, help=f"segments in one tar {default}")
    add("--workers", metavar="N", type=_count, help="decoding processes (default: one for each core)")
    add(
        "--executor",
        choices=("processes", "ray"),
        default="processes",
        help=f"where they run: on this host, or on the Ray cluster of RAY_ADDRESS {default}",
    )
    add("--seed", metavar="N", type=_seed, default=0, help=f"seed of the shuffle and the split {default}")
    add(
        "--min-seconds",
        metavar="SECONDS",
        type=_positive,
        default=5.0,
        help=f"shorter songs are refused, in seconds {default}",
    )
    add(
        "--ratings",
        metavar="FILE",
        type=Path,
        help="ratings that override those in the tags: a CSV with a header (rating, and path or title and artist; "
        "0..1 or 0..5), or the library database of Clementine or Strawberry, which is only read",
    )
    add("--replace", action="store_true", help="overwrite shards of another folder, or files of the same names")
    add("--verify", action="store_true", help="verify every checksum of the shards in --out (after packing MUSIC_DIR)")
    return parser


@one_line_errors
def main() -> None:
    """Pack, verify, or both."""
    parser = build_parser()
    args = parser.parse_args()
    if args.music_dir is None and not args.verify:
        parser.error("MUSIC_DIR is needed, unless --verify is given")
    raise_keyboard_interrupt()
    try:
        if args.music_dir is not None:
            settings = PackSettings(
                sample_rate=args.sample_rate,
                segment_seconds=args.segment_seconds,
                codec=args.codec,
                min_seconds=args.min_seconds,
                val_fraction=args.val_fraction,
                split_by=args.split_by,
                segments_per_shard=args.segments_per_shard,
                seed=args.seed,
            )
            if args.executor == "ray":
                executor, workers = ray_pool.run_all, args.workers or ray_pool.cores()
            else:
                executor, workers = process_pool.run_all, args.workers or len(os.sched_getaffinity(0))
            report = pack(args.music_dir, args.out, settings, workers, args.ratings, args.replace, executor=executor)
            summarise(report, args.out)
        if args.verify:
            check(args.out)
    except KeyboardInterrupt:
        print(f"stopped: {args.out} is unchanged; the same command continues from here", file=sys.stderr)
        sys.exit(130)


def summarise(report: Report, out: Path) -> None:
    """Print what was packed, and what was not and why."""
    for name, reason in report.refused:
        print(f"refused  {_shown(name)}: {reason}")
    for name, note in report.notes:
        print(f"kept     {_shown(name)}: {note}")
    for remark in report.remarks:
        print(remark)
    c = report.counts
    print(
        f"{c['songs']} songs, {c['seconds'] / 3600:.2f} h: {c['train_segments']} segments to train "
        f"({c['train_songs']} songs), {c['val_segments']} to validate ({c['val_songs']} songs)"
    )
    print(f"{c['duplicates']} duplicates, {c['refused']} refused, {c['passed_over']} other files passed over")
    if report.decoded_songs:
        speed = report.decoded_seconds / report.decoding_took
        print(
            f"decoded {report.decoded_songs} songs, {report.decoded_seconds / 3600:.2f} h, "
            f"in {report.decoding_took:.1f} s ({speed:.0f}x realtime)"
        )
    print(f"{out}: {'nothing has changed' if report.unchanged else 'written'}")


def check(out: Path) -> None:
    """Verify the set; raises UserError with its problems."""
    if problems := verify(out):
        raise UserError("\nerror: ".join(problems))
    print(f"{out}: all {len(read_manifest(out).files)} files are as they were packed")


def _shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)


if __name__ == "__main__":
    main()
