"""Embed songs with a trained encoder: python -m simsiam_dali.embed --checkpoint runs/NAME --out embeddings.parquet

Every song once, from clean views through the same data graph as in training: the mean over its segments' embeddings,
each scaled to length 1. Stopped or killed, the same command goes on from there and gives the same table.
"""

import argparse
import dataclasses
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from simsiam_dali.common.distributed import World, choose_device
from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.config.cli import program
from simsiam_dali.config.load import replace_settings
from simsiam_dali.config.schema import Config
from simsiam_dali.data import s3
from simsiam_dali.data.loader import Single
from simsiam_dali.data.pipeline import LogMel
from simsiam_dali.data.quarantine import Quarantine
from simsiam_dali.data.shards import SPLITS, ShardSet, Split, open_shards
from simsiam_dali.embedding import run as trained
from simsiam_dali.embedding import table as embeddings
from simsiam_dali.embedding.features import CHECKPOINT, FLOORS, Features, create_features, output_name
from simsiam_dali.embedding.resumable import Parts
from simsiam_dali.embedding.run import Trained
from simsiam_dali.packing import temporary as loose
from simsiam_dali.training.data import create_loader, log_mel_settings, view_seconds, with_statistics
from simsiam_dali.training.throughput import StepClock

PART_SECONDS = 10.0
"""How much work a kill can cost. At each part the host waits for the device once."""

FORWARD_SHARE = 4
"""A batch may hold this many times the audio of a training batch: nothing is kept for a backward pass."""


def embed_batches(
    features: Features, batches: Iterable[Single], parts: Parts, split: Split, place: Callable[[], dict[str, Any]]
) -> Iterator[Tensor]:
    """Embed batches into `parts`; gives each batch's segments `(B,)` once that is queued on the device.

    place: the loader's state after the latest batch.
    """
    rows: list[Tensor] = []
    vectors: list[Tensor] = []  # on the device: nobody waits for it but once a part
    since = time.perf_counter()
    for batch in batches:
        vectors.append(features.of(batch.data))
        rows.append(batch.segment)
        yield batch.segment
        if time.perf_counter() - since >= PART_SECONDS:
            parts.add(torch.cat(rows).cpu(), finite(torch.cat(vectors).cpu()), split, place())
            rows, vectors, since = [], [], time.perf_counter()
    if rows:
        parts.add(torch.cat(rows).cpu(), finite(torch.cat(vectors).cpu()), split, None)


def embed_segments(
    features: Features, config: Config, shards: ShardSet, log_mel: LogMel, world: World, parts: Parts
) -> str:
    """Bring every segment's vector into `parts`, after those it holds already; returns how fast it went."""
    clock, view = StepClock(world.device), view_seconds(config, shards)
    done = 0
    with tqdm(total=len(shards.segments), initial=len(parts), unit="segment", desc=features.name, disable=None) as bar:
        for split in SPLITS[SPLITS.index(parts.split) if parts.split else 0 :]:
            going_on = split == parts.split
            if not shards.count(split) or (going_on and parts.loader is None):
                continue
            loader = create_loader(config, shards, log_mel, world, split, features.mode)
            if going_on and parts.loader:
                loader.load_state_dict(parts.loader)
            for segment in embed_batches(features, clock.batches(loader), parts, split, loader.state_dict):
                done += len(segment)
                bar.set_postfix_str(
                    f"{done * view / 3600 / (time.perf_counter() - clock.started):.3g} audio-h/s", refresh=False
                )
                bar.update(len(segment))
    seconds, waited = clock.read()
    return f"{done * view / 3600 / seconds:.3g} audio-h/s, waiting for data {waited:.0%}"


def finite(vectors: Tensor) -> Tensor:
    """The vectors, if they are numbers; else UserError."""
    if not vectors.isfinite().all():
        raise UserError("the encoder gives values that are not finite: its training diverged, or try --precision fp32")
    return vectors


def embed(
    features: Features,
    config: Config,
    shards: ShardSet,
    log_mel: LogMel,
    world: World,
    about: dict[str, str],
    out: Path,
) -> str:
    """Write the table `out`; returns what to tell of it."""
    key = {
        **about,
        "device": world.device.type,
        "dtype": str(features.dtype),
        "batch_size": config.encoder.batch_size,  # of another size, a sum's order and so its last bit may differ
    }
    del key["rows"], key["checkpoint"]
    # Hidden, so that nobody looks for songs in it.
    with Parts(out.with_name(f".{out.name}.partial"), key) as parts:
        speed = embed_segments(features, config, shards, log_mel, world, parts)
        rows, vectors = parts.all()
        order = torch.argsort(rows)
        rows, vectors = rows[order], vectors[order]
        quarantine = Quarantine(shards, config.data.max_bad_fraction)
        missing = set(range(len(shards.segments))) - set(rows.tolist())
        if len(rows) + len(missing) != len(shards.segments) or not missing <= quarantine.rows:
            raise AssertionError("the data graph did not give each segment once")
        if about["rows"] == "segments":
            table = embeddings.of_segments(shards.songs, shards.segments, rows.numpy(), vectors.numpy(), about)
        else:
            song_of = torch.from_numpy(shards.segments["song"].to_numpy().copy())
            songs, means = features.of_songs(vectors, song_of)
            table = embeddings.of_songs(shards.songs, songs.numpy(), means.numpy(), about)
        embeddings.write(out, table)
        parts.remove()
    without = f", without {len(missing)} segments that do not decode (see {quarantine.path})" if missing else ""
    return f"{out}: {len(table.table)} {about['rows']} x {vectors.shape[1]} ({about['embedding']}){without}; {speed}"


def up_to_date(out: Path, about: dict[str, str], replace: bool) -> bool:
    """Whether `out` is already what would be made. Raises UserError when it is something else, unless `replace`."""
    if not out.exists():
        return False
    differ: list[str] = []
    try:
        there = embeddings.read_about(out)
        what = ("features", "rows", "checkpoint_sha256", "shards", "embedding", "view_seconds")
        differ = [name for name in what if there.get(name) != about[name]]
        if not differ:
            return True
        reason = f"holds embeddings of other {', '.join(n.removesuffix('_sha256').replace('_', ' ') for n in differ)}"
    except UserError:
        reason = "is no table of embeddings that this program reads"
    if not replace:
        raise UserError(f"{out} {reason}: name another --out, or give --replace")
    return False


def batch_size(config: Config, view: float, training_view: float) -> int:
    """Segments a batch, so that batches of `view` s take no more memory than the training's of `training_view` s."""
    fits = int(FORWARD_SHARE * config.encoder.batch_size * training_view / view)
    return max(2, min(config.encoder.batch_size, fits))


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = argparse.ArgumentParser(
        prog=program("embed"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", default="", metavar="RUN",
        help="a run's folder or name, or a checkpoint file (default: the newest run in runs/)")  # fmt: skip
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--shards", type=s3.place, metavar="DIR", help="songs to embed (default: the training's shards)"
    )
    source.add_argument("--music", type=Path, nargs="+", metavar="PATH",
                        help="folders or files instead, packed for the moment as the training's shards are",
    )  # fmt: skip
    add("--out", type=Path, default=Path("embeddings.parquet"), metavar="FILE", help="the table (default: %(default)s)")
    add("--per-segment", action="store_true", help="a row for each segment, with its start in s, instead of each song")
    add("--embedding", choices=["backbone", "projection"],
        help="of a simsiam encoder (default: encoder.simsiam.embedding of the training)")  # fmt: skip
    add("--view-seconds", type=float, metavar="S",
        help="the middle S seconds of each segment (default: the whole segment)")  # fmt: skip
    add("--features", choices=[CHECKPOINT, *FLOORS], default=CHECKPOINT,
        help="the trained encoder, or a floor it has to beat (default: %(default)s)")  # fmt: skip
    add("--floors", type=Path, nargs="?", const=Path(), metavar="DIR",
        help="write all floors too, into DIR (default: floors/ beside --out)")  # fmt: skip
    add("--batch-size", type=int, metavar="N",
        help=f"segments a batch (default: the training's, with at most {FORWARD_SHARE} times its audio)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="DALI's CPU threads (default: the training's; auto = all cores)")
    add("--device", choices=["auto", "cpu", "gpu"], default="auto", help="auto takes the GPU when there is one")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="autocast (default: the training's)")
    add("--replace", action="store_true", help="write over a table of something else")
    return parser


def embedding_config(
    config: Config,
    segment_seconds: float,
    view_seconds: float | None = None,
    batch: int | None = None,
    threads: int | None = None,
    **over: object,
) -> Config:
    """The training's settings as embedding takes them, for segments of this length; None = as the command's help says.

    over: other settings, by dotted key with __ for the dot.
    """
    view = segment_seconds if view_seconds is None else view_seconds
    own = len(os.sched_getaffinity(0)) if config.data.threads == "auto" else config.data.threads
    fits = batch_size(config, view, config.data.view_seconds or segment_seconds)
    return replace_settings(
        config,
        data__view_seconds=view,
        data__threads=own if threads is None else threads,
        encoder__batch_size=fits if batch is None else batch,
        train__micro_batch="auto",  # the training's: no activation is kept for a backward pass here
        encoder__simsiam__augmentation__spec_augment=False,  # a mask longer than a short view would be refused
        **over,
    )


def described(name: str, rows: str, run: Trained, music: str, fingerprint: str) -> dict[str, str]:
    """`Embeddings.about` of a table: the features `name`, by "songs" or "segments"."""
    config = run.config
    return {
        "features": name,
        "rows": rows,
        "encoder_type": config.encoder.encoder_type,
        "embedding": output_name(name, config),
        "checkpoint": str(run.path),
        "checkpoint_sha256": run.sha256,
        "music": music,
        "shards": fingerprint,
        "view_seconds": f"{config.data.view_seconds:g}",
        "mlflow_run": run.mlflow_run or "",
        "tracking_uri": config.mlflow.tracking_uri,
    }


def run(args: argparse.Namespace) -> None:
    """What the command does: see which tables are wanted and not there yet, and make them."""
    device = choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    trained_run = trained.read(args.checkpoint)
    packed = args.out.with_name(f".{args.out.name}.packed")
    loose_songs, shards = None, None
    if args.music:
        packing = trained_run.packing
        loose_songs = loose.find(args.music, packing)
        print(f"segments of {packing.segment_seconds:g} s, as in the training")
        seconds, fingerprint, music = packing.segment_seconds, loose_songs.fingerprint, str(loose_songs.root)
    else:
        shards = open_shards(args.shards or trained_run.config.data.shards)
        seconds, fingerprint, music = shards.segment_seconds, shards.fingerprint, shards.manifest.music
    if args.embedding:
        trained_run = trained_run.with_embedding(args.embedding)
    config = embedding_config(
        trained_run.config, seconds, args.view_seconds, args.batch_size, args.threads, train__precision=args.precision
    )
    trained_run = dataclasses.replace(trained_run, config=config)
    if shards:
        view_seconds(config, shards)  # refused before anything is written
    log_mel = with_statistics(log_mel_settings(config), **trained_run.statistics)

    wanted = {args.features: args.out}
    if args.floors is not None:
        folder = args.out.parent / "floors" if args.floors == Path() else args.floors
        wanted |= {name: folder / f"{name}.parquet" for name in FLOORS if name != args.features}
    tables = []
    for name, out in wanted.items():
        rows = "segments" if args.per_segment else "songs"
        about = described(name, rows, trained_run, music, fingerprint)
        if up_to_date(out, about, args.replace):
            print(f"{out} is up to date")
        else:
            tables.append((about, out))

    if tables and loose_songs:
        shards, report = loose_songs.packed(packed)
        for title, lines in (("refused", report.refused), ("kept", report.notes)):
            for name, reason in lines:
                print(f"{title:8} {name if name.isprintable() else ascii(name)}: {reason}")
    for about, out in tables:
        assert shards is not None
        features = create_features(about["features"], trained_run, log_mel, device)
        print(embed(features, config, shards, log_mel, World(0, 1, device), about, out))
    shutil.rmtree(packed, ignore_errors=True)


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job starts with SIGINT ignored
        signal.signal(number, _stop)
    try:
        run(args)
    except torch.OutOfMemoryError as e:
        raise UserError("out of memory: use a smaller --batch-size or shorter --view-seconds") from e
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def _stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature is given
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
