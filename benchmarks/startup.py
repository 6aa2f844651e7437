"""How long opening a set takes before a run begins: `python benchmarks/startup.py --out results/startup/NAME.json`.

Writes a set of --shards tars with --segments tiny samples each to a scratch folder, in the format that make_shards
writes, and opens it in fresh processes, the files in the page cache. Opening checks the format's version, each file's
size, and each index against its tar and the segment table.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import torch

from simsiam_dali.data.format import FILES, FORMAT_VERSION, SEGMENTS, SONGS, FileSum, Manifest
from simsiam_dali.packing.write import write_manifest, write_shard, write_table

OPEN = """
import sys, time
from pathlib import Path
from simsiam_dali.data.shards import open_shards
began = time.perf_counter()
shards = open_shards(Path(sys.argv[1]))
print(time.perf_counter() - began)
"""


def write_set(folder: Path, shards: int, segments: int) -> None:
    """A set of `shards` tars, one in ten to validate, a song for every four segments."""
    rows: list[dict[str, Any]] = []
    sums: dict[str, FileSum] = {}
    for n in range(shards):
        split = "val" if n >= shards - shards // 10 else "train"
        name = f"{split}-{n if split == 'train' else n - (shards - shards // 10):06d}.tar"
        keys = [f"{row:09d}" for row in range(n * segments, (n + 1) * segments)]
        sums |= write_shard(folder / name, ((k, {"flac": b"fLaC", "row": int(k).to_bytes(8, "little")}) for k in keys))
        rows += [
            {
                "song": int(key) // 4, "key": key, "split": split, "shard": name, "start": 60.0 * (int(key) % 4),
                "seconds": 60.0, "sample_rate": 16000,
            }
            for key in keys
        ]  # fmt: skip
    songs = [
        {
            "path": f"artist/album {song // 10}/{song}.mp3", "other_paths": [], "title": f"song {song}",
            "artists": ["artist"], "albums": [f"album {song // 10}"], "album_artist": "artist", "year": 2000,
            "genres": ["genre"], "rating": 0.5, "duration": 240.0, "sample_rate": 44100, "channels": 2,
            "audio_hash": f"{song:064x}", "split": "train", "note": "",
        }
        for song in range(-(-len(rows) // 4))
    ]  # fmt: skip
    for name, table in ((SONGS, songs), (SEGMENTS, rows), (FILES, [])):
        sums[name] = write_table(folder / name, table)
    settings = {"codec": "flac", "sample_rate": 16000, "segment_seconds": 60.0}
    write_manifest(folder, Manifest(FORMAT_VERSION, "", settings, {}, sums))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000, help="of the set that is opened (default: %(default)s)")
    parser.add_argument("--segments", type=int, default=256, help="in each shard (default: %(default)s)")
    parser.add_argument("--times", type=int, default=5, help="that it is opened (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to keep the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write_set(Path(scratch), args.shards, args.segments)
        command = [sys.executable, "-c", OPEN, scratch]
        seconds = [
            float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(args.times)
        ]
    print(f"{args.shards} shards of {args.segments} segments: opened in {sorted(seconds)} s")
    if args.out:
        about = {"shards": args.shards, "segments": args.segments, "seconds": seconds}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine.environment(torch.device("cpu")), **about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
