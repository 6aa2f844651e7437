"""Cost of a library as it grows: `python benchmarks/large_library.py --songs 1000 10000 100000`.

Each size is packed and then opened, both in a process of its own, so that its peak memory is its own:

    pack     the packer from its list of files to the finished set. Decoding is replaced by a stub: every song has
             `--segments` encoded segments, copied from one small file, and random tags. Everything else is the real
             packer: duplicates, split, shuffle, tables, tars with indexes, checksums, manifest.
    again    the same with one song more in a hundred: what is there already is taken out of the old set's tables and
             tars.
    load     from `open_shards` to the first training batch, then `BATCHES` more. Songs and segments are of the
             number that is written; a segment is only `SECONDS` long, so that 400,000 fit on a disk.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from simsiam_dali.common.errors import one_line_errors
from simsiam_dali.data.format import SEGMENTS, SONGS
from simsiam_dali.data.shards import open_shards
from simsiam_dali.packing.find import SongFile
from simsiam_dali.packing.pack import pack
from simsiam_dali.packing.pack_song import Cut, Job, Packed, PackSettings, Result
from simsiam_dali.packing.segments import encode
from simsiam_dali.packing.tags import Tags

RATE = 16000  # Hz
SECONDS = 0.25  # of a generated segment
DIFFERENT = 64  # generated segments; all others are copies of them
BATCHES = 50
ROOT = Path(__file__).resolve().parent.parent


def memory(field: str) -> int:
    """This process's `VmRSS` (now) or `VmHWM` (highest so far), bytes; getrusage would count its parent's, too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def wave(seed: int, seconds: float) -> np.ndarray:
    """A tone in noise, float32, peak below 0.5."""
    rng, time_s = np.random.default_rng(seed), np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * rng.uniform(100, 3000) * time_s) + 0.01 * rng.standard_normal(len(time_s))).astype(
        np.float32
    )


def song_names(number: int) -> list[str]:
    """Paths as a library has them: an artist's folder, an album's, the title."""
    return [
        f"Artist number {i // 12 % 20000:05d}/An album of theirs {i // 12:06d}/{i % 12:02d} Title.flac"
        for i in range(number)
    ]


def stub_decoder(material: Path, segments: int) -> Callable[..., Generator[tuple[Job, Result], None, None]]:
    """An executor that has, for every song, `segments` cuts out of the file `material`, and tags."""
    contents = [encode(wave(seed, SECONDS), RATE, "flac") for seed in range(DIFFERENT)]
    material.write_bytes(b"".join(contents))
    offsets = list(itertools.accumulate(map(len, contents), initial=0))

    def run(_function: Any, jobs: Iterable[Job], _workers: int) -> Generator[tuple[Job, Result], None, None]:
        for number, job in enumerate(jobs):
            artist, album, title = job.file.name.removesuffix(".flac").split("/")
            rng = np.random.default_rng(number)
            drawn = rng.integers(DIFFERENT, size=segments)
            cuts = tuple(
                Cut(60.0 * i, 60.0, material, offsets[d], len(contents[d])) for i, d in enumerate(drawn.tolist())
            )
            packed = job.known or Packed(RATE, 44100, 2, 60.0 * segments, rng.bytes(32).hex(), "", cuts)
            rating = float(rng.integers(1, 6)) / 5 if number % 3 == 0 else math.nan
            tags = Tags(f"{title} {number}", (artist,), (album,), artist, 1960 + number % 65, ("Rock",), rating)
            yield job, Result(packed, tags, 0.0 if job.known else 60.0 * segments)

    return run


def measure_packing(folder: Path, songs: int, segments: int, step: str) -> dict[str, Any]:
    """Pack `songs` into `folder`; seconds and this process's peak memory."""
    (folder / "music").mkdir(exist_ok=True)
    before, began = memory("VmRSS"), time.monotonic()
    executor = stub_decoder(folder / "material", segments)
    pack(
        folder / "music",
        folder / "shards",
        PackSettings(segment_seconds=SECONDS),
        1,
        files=[SongFile(folder / "music" / name, name, 5_000_000 + i, i) for i, name in enumerate(song_names(songs))],
        executor=executor,
    )
    measured = {"seconds": time.monotonic() - began, "peak_bytes": memory("VmHWM"), "start_bytes": before}
    return {f"{step}_{name}": value for name, value in measured.items()}


def measure_loading(folder: Path) -> dict[str, Any]:
    """Open what was packed there and read batches; seconds, table sizes and this process's peak memory."""
    # Not above: the packer's memory is measured without torch and DALI, which it does not import.
    import torch

    from simsiam_dali.common.distributed import World
    from simsiam_dali.config.load import load_config
    from simsiam_dali.training.data import create_loader, log_mel_settings

    before, began = memory("VmRSS"), time.monotonic()
    shards = open_shards(folder / "shards")
    opened = time.monotonic() - began
    config = load_config(
        assignments=["data.threads=2", "encoder.batch_size=64", "encoder.simsiam.augmentation.spec_augment=false"]
    )
    log_mel = log_mel_settings(config)
    loader = create_loader(config, shards, log_mel, World(0, 1, torch.device("cpu")), "train", "views", shuffled=True)
    batches = loader.endless()
    next(batches)
    first = time.monotonic() - began
    for _ in itertools.islice(batches, BATCHES):
        pass
    return {
        "segments": len(shards.segments),
        "open_seconds": opened,
        "first_batch_seconds": first,
        "load_peak_bytes": memory("VmHWM"),
        "load_start_bytes": before,
        "songs_bytes": (folder / "shards" / SONGS).stat().st_size,
        "segments_bytes": (folder / "shards" / SEGMENTS).stat().st_size,
        "tar_bytes": sum(Path(tar).stat().st_size for tar in shards.tars("train") + shards.tars("val")),
    }


def apart(*words: object) -> dict[str, Any]:
    """A step of this program in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="large_library.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    sizes = [1000, 10_000, 100_000]
    add("--songs", type=int, nargs="*", default=sizes, metavar="N", help="libraries to generate (default: %(default)s)")
    add("--segments", type=int, default=4, metavar="N", help="segments of a song (default: %(default)s)")
    add("--scratch", type=Path, metavar="DIR", help="where to work; 7 GB for 100,000 songs (default: /tmp or TMPDIR)")
    add("--json", type=Path, metavar="F", help="write the results here")
    add("--step", choices=["pack", "again", "load"], help=argparse.SUPPRESS)
    return parser


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    if args.step in ("pack", "again"):
        songs = args.songs[0] if args.step == "pack" else math.ceil(args.songs[0] * 1.01)
        print(json.dumps(measure_packing(args.scratch, songs, args.segments, args.step)))
    elif args.step == "load":
        print(json.dumps(measure_loading(args.scratch)))
    else:
        measure_all(args)


def measure_all(args: argparse.Namespace) -> None:
    """Every size, one after the other; each one's files are gone before the next."""
    import machine  # these two not above: the steps, which are this program too, are measured without them
    import torch

    doc: dict[str, Any] = {"environment": machine.environment(torch.device("cpu")), "songs": []}
    for songs in args.songs:
        with scratch(args.scratch) as folder:
            where = ("--scratch", folder, "--segments", args.segments, "--songs", songs)
            row = {"songs": songs}
            for step in ("pack", "load", "again"):
                row |= apart("--step", step, *where)
        doc["songs"].append(row)
        print(
            f"{songs} songs, {row['segments']} segments: packed in {row['pack_seconds']:.0f} s with"
            f" {row['pack_peak_bytes'] / 1e6:.0f} MB, again in {row['again_seconds']:.0f} s with"
            f" {row['again_peak_bytes'] / 1e6:.0f} MB, first batch after {row['first_batch_seconds']:.1f} s (opened"
            f" after {row['open_seconds']:.1f}), loader {row['load_peak_bytes'] / 1e6:.0f} MB, song table"
            f" {row['songs_bytes'] / 1e6:.1f} MB",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(doc, indent=1) + "\n")


def scratch(parent: Path | None) -> tempfile.TemporaryDirectory[str]:
    """A folder that is gone afterwards."""
    return tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=False)


if __name__ == "__main__":
    main()
