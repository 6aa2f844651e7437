"""Embed songs with a trained encoder: python -m simsiam_dali.embed --checkpoint runs/NAME --out embeddings.parquet

Writes one vector per song: the mean of its segments' embeddings, each scaled to length 1, from clean views through the
training's data graph. After a stop or a kill, the same command continues and writes the same table.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path

import torch

from simsiam_dali.common.distributed import World, choose_device
from simsiam_dali.common.errors import UserError, stops_with
from simsiam_dali.common.signals import raise_keyboard_interrupt
from simsiam_dali.config.cli import add_checkpoint, add_device, create_parser
from simsiam_dali.data import s3
from simsiam_dali.data.shards import open_shards
from simsiam_dali.embedding.features import BASELINES, CHECKPOINT, create_features
from simsiam_dali.embedding.records import of_shards, records_path, write_records
from simsiam_dali.embedding.run import read_run
from simsiam_dali.embedding.write import (
    FORWARD_SHARE,
    CleanViews,
    dtype_name,
    embedding_config,
    is_up_to_date,
    table_provenance,
    write_table,
)
from simsiam_dali.packing import temporary
from simsiam_dali.training.data import log_mel_settings, view_seconds, with_statistics
from simsiam_dali.training.learner import autocast_dtype
from simsiam_dali.training.memory import refuse_out_of_memory

OTHER_TABLES = (".csv", ".tsv", ".json", ".xlsx")
"""Suffixes of tables that are no Parquet files."""


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = create_parser("embed", __doc__)
    add_checkpoint(parser)
    songs = parser.add_mutually_exclusive_group()
    songs.add_argument(
        "--shards", type=s3.location, metavar="DIR", help="songs to embed (default: the training's shards)"
    )
    songs.add_argument("--music", type=Path, nargs="+", metavar="PATH",
        help="embed these folders or files instead (packed temporarily, as the training's shards were)",
    )  # fmt: skip
    add = parser.add_argument
    add("--ratings", type=Path, metavar="FILE",
        help="with --music: ratings that override those in the tags, as for packing")  # fmt: skip
    add("--out", type=Path, default=Path("embeddings.parquet"), metavar="FILE", help="the table (default: %(default)s)")
    add("--per-segment", action="store_true", help="a row for each segment, with its start in s, instead of each song")
    add("--view-seconds", type=float, metavar="S",
        help="the middle S seconds of each segment (default: the whole segment)")  # fmt: skip
    add("--features", choices=[CHECKPOINT, *BASELINES], default=CHECKPOINT,
        help="the trained encoder, or a baseline (default: %(default)s)")  # fmt: skip
    add("--baselines", type=Path, nargs="?", const=Path(), metavar="DIR",
        help="write all baselines too, into DIR (default: baselines/ beside --out)")  # fmt: skip
    add("--batch-size", type=int, metavar="N",
        help="segments per batch (default: the training's micro-batch, with at most"
        f" {FORWARD_SHARE} times its audio)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="DALI's CPU threads (default: as many as the training used)")
    add_device(parser)
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="autocast (default: the training's)")
    add("--replace", action="store_true", help="overwrite --out even if it holds other embeddings")
    return parser


def run(args: argparse.Namespace) -> None:
    """Find which of the requested tables are missing, and write them."""
    device = choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if args.out.suffix.lower() in OTHER_TABLES:
        raise UserError(f"--out {args.out}: the table is a Parquet file, name it {args.out.with_suffix('.parquet')}")
    if args.ratings and not args.music:
        raise UserError("--ratings goes with --music: shards have the ratings that they were packed with")
    trained = read_run(args.checkpoint, embedding=args.embedding)
    files, shards = None, None
    if args.music:
        files = temporary.find(args.music, trained.packing, args.ratings)
        seconds, fingerprint, music = files.settings.segment_seconds, files.fingerprint, str(files.root)
        print(f"segments of {seconds:g} s, as in the training")
    else:
        shards = open_shards(args.shards or trained.config.data.shards)
        seconds, fingerprint, music = shards.segment_seconds, shards.fingerprint, shards.manifest.music
    config = embedding_config(
        trained.config, seconds, args.view_seconds, args.batch_size, args.threads, train__precision=args.precision
    )
    trained = dataclasses.replace(trained, config=config)
    if shards:
        view_seconds(config, shards)  # refused before anything is written

    wanted = {args.features: args.out}
    if args.baselines is not None:
        folder = args.out.parent / "baselines" if args.baselines == Path() else args.baselines
        wanted |= {name: folder / f"{name}.parquet" for name in BASELINES if name != args.features}
    missing = {}
    for name, out in wanted.items():
        provenance = table_provenance(name, "segments" if args.per_segment else "songs", trained, music, fingerprint)
        if args.precision and name in (CHECKPOINT, "untrained"):
            provenance["precision"] = dtype_name(autocast_dtype(args.precision, device))
        if is_up_to_date(out, provenance, args.replace):
            print(f"{out} is up to date")
        else:
            missing[out] = provenance

    packed = args.out.with_name(f".{args.out.name}.packed")
    if missing:
        if files:
            shards, report = files.packed(packed)
            for line in (*report.file_lines(), *report.remarks):
                print(line)
        assert shards is not None
        log_mel = with_statistics(log_mel_settings(config), **trained.statistics)
        views = CleanViews(config, shards, log_mel, World(0, 1, device))
        for out, provenance in missing.items():
            features = create_features(provenance["features"], trained, log_mel, device)
            if (provenance["features"], provenance["rows"]) == (CHECKPOINT, "songs"):
                # Before the table: a kill between the two leaves records of another table, which are ignored.
                write_records(records_path(out), of_shards(shards, fingerprint))
            print(write_table(features, views, provenance, out))
    shutil.rmtree(packed, ignore_errors=True)


@stops_with("the same command continues from here")
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    raise_keyboard_interrupt()
    with refuse_out_of_memory("use a smaller --batch-size or shorter --view-seconds"):
        run(args)


if __name__ == "__main__":
    main()
