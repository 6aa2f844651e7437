"""Pack a folder of songs into WebDataset shards: `python tools/make_shards.py music/`."""

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from simsiam_dali.data.packing import PackSettings, Report, pack
from simsiam_dali.data.shards import read_manifest, verify
from simsiam_dali.errors import UserError, one_line_errors


def build_parser() -> argparse.ArgumentParser:
    """The command line; every default stands here."""
    parser = argparse.ArgumentParser(
        prog="make_shards.py",
        description=(
            "Pack every song below MUSIC_DIR into shards that training reads. Run again after adding songs: only "
            "new and changed files are decoded, and no song changes its split. Until the new shards are complete "
            "the old ones stay in place, so there must be room for both."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "music_dir", metavar="MUSIC_DIR", type=Path, nargs="?", help="folder of songs; optional with --verify"
    )
    add("--out", type=Path, default=Path("shards"), help="folder of the shards")
    add(
        "--sample-rate",
        type=_sample_rate,
        default=16000,
        help="Hz of the packed audio, or native: each song's own",
    )
    add("--segment-seconds", type=_positive, default=60.0, help="length of a segment in seconds")
    add("--codec", choices=("flac", "wav", "ogg"), default="flac", help="of the packed audio: mono, 16 bit")
    add(
        "--val-fraction",
        type=_fraction,
        default=0.1,
        help="share of the groups (see --split-by) for validation",
    )
    add("--split-by", choices=("album", "artist", "song"), default="album", help="what is never torn apart")
    add("--segments-per-shard", type=_count, default=256, help="segments in one tar")
    add(
        "--workers",
        type=_count,
        default=os.cpu_count() or 1,
        help="decoding processes; default: one for each core",
    )
    add("--seed", type=int, default=0, help="of the shuffle and the split")
    add("--min-seconds", type=_positive, default=5.0, help="shorter songs are refused, in seconds")
    add(
        "--ratings",
        type=Path,
        metavar="FILE",
        help="ratings that win over the tags': a CSV (rating and path, or title and artist; 0..1 or 0..5), or the "
        "library database of Clementine or Strawberry",
    )
    add(
        "--replace",
        action="store_true",
        help="write over shards of another folder, or files of the same names",
    )
    add(
        "--verify",
        action="store_true",
        help="check every sum of the shards in --out, after packing if asked to",
    )
    return parser


@one_line_errors
def main() -> None:
    """Pack, verify, or both."""
    parser = build_parser()
    args = parser.parse_args()
    if args.music_dir is None and not args.verify:
        parser.error("MUSIC_DIR is needed, unless --verify is given")
    signal.signal(signal.SIGTERM, _stop)
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
            summarise(
                pack(args.music_dir, args.out, settings, args.workers, args.ratings, args.replace), args.out
            )
        if args.verify:
            check(args.out)
    except KeyboardInterrupt:
        print(f"stopped: {args.out} is as it was; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def summarise(report: Report, out: Path) -> None:
    """What was packed, what was not and why."""
    for name, reason in report.refused:
        print(f"refused  {name}: {reason}")
    for name, note in report.notes:
        print(f"kept     {name}: {note}")
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
    """Verify the set; problems go to the screen."""
    if problems := verify(out):
        raise UserError("\nerror: ".join(problems))
    print(f"{out}: all {len(read_manifest(out).files)} files are as they were packed")


def _stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature is given
    raise KeyboardInterrupt


def _sample_rate(text: str) -> int | None:
    return None if text == "native" else _count(text)


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def _positive(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def _fraction(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 <= fraction < 1")
    return float(text)


if __name__ == "__main__":
    main()
