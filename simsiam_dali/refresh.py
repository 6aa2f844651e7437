"""Keep embeddings and playlists fresh: python -m simsiam_dali.refresh music/

Finds songs that were added, changed, moved or removed since the table was written, embeds only new audio, drops songs
that are gone, and regenerates the playlists that were saved from the table. The table and the playlists are replaced
together: after a stop or a kill at any moment, either all are old or all are new.
"""

import argparse
import contextlib
import shlex
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from simsiam_dali.common.distributed import choose_device
from simsiam_dali.common.errors import UserError, printable, stops_with
from simsiam_dali.common.files import refuse_failed_write
from simsiam_dali.common.replacement import Replacement, finish_commit
from simsiam_dali.common.signals import raise_keyboard_interrupt
from simsiam_dali.config.cli import add_device, create_parser
from simsiam_dali.data import s3
from simsiam_dali.data.commit import MANIFEST
from simsiam_dali.embedding.changes import Changes, compare, refuse_loss
from simsiam_dali.embedding.previous import Previous, read_previous
from simsiam_dali.embedding.records import open_tables, records_path, same_audio, write_records
from simsiam_dali.embedding.refresh import Refreshed, never_trained_on, refresh
from simsiam_dali.embedding.run import TrainedRun
from simsiam_dali.embedding.table import write_embeddings
from simsiam_dali.packing.find import SongFile, find_songs
from simsiam_dali.packing.ratings import RatingsFile
from simsiam_dali.recommendation.library import Library
from simsiam_dali.recommendation.remake_all import Remade, is_newer, remake_all
from simsiam_dali.recommendation.saved import read_saved
from simsiam_dali.training.memory import refuse_out_of_memory

TRAIN_AGAIN = 0.2
"""Training again is advised when more than this share of the songs was not among those of the training."""
_NAMED = 20


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = create_parser("refresh", __doc__)
    add = parser.add_argument
    add("music", type=Path, metavar="MUSIC", help="the music folder")
    add("--checkpoint", default="", metavar="RUN",
        help="a run's folder or name, or a checkpoint file (default: the table's, or without a table the newest run)",
    )  # fmt: skip
    add("--out", type=Path, default=Path("embeddings.parquet"), metavar="FILE",
        help="the table to refresh, created if missing (default: %(default)s)")  # fmt: skip
    add("--playlists", type=Path, default=Path("playlists"), metavar="DIR",
        help="the playlists that recommend --save wrote (default: %(default)s)")  # fmt: skip
    add("--ratings", type=Path, metavar="FILE", help="ratings that override those in the tags, as for packing")
    add("--shards", type=s3.location, metavar="DIR",
        help="shards that the table was made from, if its records are missing (default: the training's)")  # fmt: skip
    add("--batch-size", type=int, metavar="N", help="segments per batch (default: as for embed)")
    add("--threads", type=int, metavar="N", help="DALI's CPU threads (default: as many as the training used)")
    add_device(parser)
    add("--dry-run", action="store_true",
        help="show what would be done, and write nothing (an interrupted refresh is finished first)")  # fmt: skip
    add(
        "--replace",
        action="store_true",
        help="continue even if more than half of the songs are gone, or rebuild a table that cannot be continued",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Look for changes, make the new table and playlists, and replace the old ones."""
    if not args.music.is_dir():
        raise UserError(f"{args.music}: no such folder of music (is its disk mounted?)")
    device = choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if args.dry_run:
        finish_commit(args.out)
        previous, files, changes = look(args)
        print_plan(changes, previous, sum(playlist.is_of(args.out) for playlist in read_saved(args.playlists)))
        return
    with contextlib.ExitStack() as stack:
        with refuse_failed_write(args.out):
            replacement = stack.enter_context(Replacement(args.out, [args.playlists]))
        read_saved(args.playlists)  # refused now, if any is damaged, and not after hours
        previous, files, changes = look(args)
        print_waiting(changes)
        music = args.music.absolute()
        ratings = RatingsFile.read(args.ratings, music) if args.ratings else None
        scratch = args.out.with_name(f".{args.out.name}.packed")
        made = refresh(previous, changes, files, music, ratings, device, scratch)
        remade: list[Remade] = []
        saved = read_saved(args.playlists)  # as they are now
        playlists = [playlist for playlist in saved if playlist.is_of(args.out)]
        others = [f"{one.name}: a playlist of {one.table_path()}" for one in saved if one not in playlists]
        if made.songs is previous.songs:
            playlists = [playlist for playlist in playlists if not is_newer(playlist, args.out)]
        if playlists:
            hashes = {file.path: file.audio_hash for file in made.records.files.values()}
            same = same_audio(hashes, made.songs.table["path"])
            library = Library(made.songs.table, music.resolve(), same)
            remade = remake_all(playlists, library, made.songs.unit(), dict(made.report.moved))
        with refuse_failed_write(args.out):
            replace_all(replacement, args.out, previous, made, remade)
        shutil.rmtree(scratch, ignore_errors=True)
    print_list("kept", others)
    print_report(args.out, previous, made, remade)
    advise_training(args, previous, made)


def look(args: argparse.Namespace) -> tuple[Previous, list[SongFile], Changes]:
    """The table as it is, the files in the music folder, and what has changed between them."""
    previous = read_previous(args.out, args.checkpoint, args.shards, args.replace, args.batch_size, args.threads)
    files, _ = find_songs(args.music.absolute())
    for file in files:
        if file.path == args.music.absolute():
            raise UserError(f"{args.music}: {file.problem}")
    if not files:
        raise UserError(f"{args.music}: no audio file in this folder (is its disk mounted?)")
    changes = compare(files, previous.records.files, time.time())
    if not args.replace:
        refuse_loss(changes, previous.records.files, args.music)
    return previous, files, changes


def replace_all(
    replacement: Replacement, out: Path, previous: Previous, made: Refreshed, remade: Iterable[Remade]
) -> None:
    """Write what differs from what is there, and let it take its place as one set."""
    if made.songs is not previous.songs:
        write_embeddings(replacement.stage(out), made.songs)
    records = replacement.stage(records_path(out))
    write_records(records, made.records)
    if records_path(out).exists() and records_path(out).read_bytes() == records.read_bytes():
        replacement.drop(records_path(out))
    for playlist in remade:
        for path, content in playlist.files.items():
            with refuse_failed_write(path):
                replacement.stage(path).write_bytes(content)
    # The set is complete, and moving it is quick: signals wait.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        replacement.commit()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for playlist in remade:
        for path in playlist.unchanged:
            path.touch()  # newer than the table, from which it would be the same


def print_list(title: str, lines: list[str]) -> None:
    """One line for each of the first items, and how many more there are."""
    for line in lines[:_NAMED]:
        print(f"{title:9} {printable(line)}")
    if len(lines) > _NAMED:
        print(f"{title:9} and {len(lines) - _NAMED} more")


def print_waiting(changes: Changes) -> None:
    """What is left for the next time."""
    print_list(
        "waiting", [f"{file.name}: modified just now, it may still be being written" for file in changes.waiting]
    )
    print_list("unread", [f"{file.name}: {file.problem}; what is known of it is kept" for file in changes.unreadable])


def print_plan(changes: Changes, previous: Previous, playlists: int) -> None:
    """What would be done, as far as names, sizes and times tell."""
    records = previous.records.files
    print_waiting(changes)
    moved = {record.path for record in changes.moved}
    print_list("changed", [file.name for file in changes.decode if file.name in records])
    print_list("new", [file.name for file in changes.decode if file.name not in records])
    print_list("moved", sorted(moved))
    print_list("gone", [record.path for record in changes.gone if record.path not in moved])
    print(
        f"{len(changes.decode)} files would be decoded, {len(changes.known)} are as before, {len(changes.gone)} are not"
        f" where they were; {playlists} saved playlists would be made again; nothing was written"
    )


def print_report(out: Path, previous: Previous, made: Refreshed, remade: Iterable[Remade]) -> None:
    """What has changed."""
    found = made.report
    print_list("new", found.new)
    print_list("changed", found.changed)
    print_list("retagged", [f"{path}: the same audio, its vector is kept" for path in found.retagged])
    print_list("moved", [f"{before} -> {path}" for before, path in found.moved])
    print_list("duplicate", [f"{path}: the same audio as {of}" for path, of in found.duplicates])
    print_list("gone", found.gone)
    print_list("refused", [f"{path}: {reason}" for path, reason in made.refused])
    for playlist in remade:
        if playlist.problem:
            print(f"kept      {printable(playlist.problem)}; its songs stay as they are")
        elif playlist.files:
            print(f"playlist  {printable(playlist.name)}: {playlist.added} songs added, {playlist.removed} removed")
    counts = ", ".join(
        f"{len(getattr(found, name))} {name}" for name in ("new", "changed", "retagged", "moved", "gone")
    )
    if found.matched is not None:
        print(f"{found.matched} of {len(made.songs.table)} songs matched in the file of ratings")
    print(f"{out}: {len(made.songs.table)} songs ({counts})")
    if made.songs is previous.songs and not any(playlist.files for playlist in remade):
        print("nothing has changed")


def advise_training(args: argparse.Namespace, previous: Previous, made: Refreshed) -> None:
    """Say when so many songs are new to the encoder that training again is worth it."""
    location = previous.run.config.data.shards
    is_local = not str(location).startswith(s3.SCHEME)
    packed = open_tables(location) if is_local and (Path(location) / MANIFEST).exists() else None
    new, songs = never_trained_on(made.songs, made.records, previous.run, packed), len(made.songs.table)
    if new > TRAIN_AGAIN * songs:
        # Of a file, or else they come from the tags, which are read again.
        ratings = f" --ratings {shlex.quote(str(args.ratings))}" if args.ratings else ""
        music, shards, out = (shlex.quote(str(path)) for path in (args.music, location, args.out))
        print(
            f"{new} of {songs} songs, more than {TRAIN_AGAIN:.0%}, were not in the training: train again\n"
            f"    python -m simsiam_dali.pack {music} --out {shards}{ratings}\n"
            f"    python -m simsiam_dali.train {same_settings(previous.run)} --shards {shards}\n"
            f"    python -m simsiam_dali.embed --out {out} --replace"
        )


def same_settings(run: TrainedRun) -> str:
    """Options of a training with the settings of `run`; only its encoder type where its config.yaml is gone."""
    config = run.path.parent / "config.yaml"
    if not config.exists():
        return f"--encoder-type {run.config.encoder.encoder_type}"
    named = " --set train.run_name=null" if run.config.train.run_name else ""
    return f"--config {shlex.quote(str(config))}{named}"


@stops_with("the table and the playlists are as they were; the same command continues")
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    raise_keyboard_interrupt()
    with refuse_out_of_memory("use a smaller --batch-size"):
        run(args)


if __name__ == "__main__":
    main()
