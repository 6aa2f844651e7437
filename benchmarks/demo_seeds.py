"""Does the demo convince, whatever the seed? python benchmarks/demo_seeds.py DIR --json FILE

Runs tools/demo.py with several seeds, each of the library and of the training, and counts of how many songs the nearest
is by the same artist: for the trained encoder, the untrained one, MFCCs and the log-mel, with the 95% intervals of the
paired differences; and what each stage took. A seed that FILE has is not run again.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import machine
import torch

from simsiam_dali.common.errors import one_line_errors
from simsiam_dali.embedding.table import read_song_embeddings
from simsiam_dali.evaluation import nearest_song

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import demo

BASELINES = ("untrained", "mfcc", "log-mel")


def measure(folder: Path, seed: int) -> dict[str, Any]:
    """One run of the demo: its sentence, counts and times (wall and CPU seconds)."""
    done = demo.run(folder, seed)
    songs = read_song_embeddings(done.run / "embeddings.parquet")
    tables = {name: read_song_embeddings(done.run / "baselines" / f"{name}.parquet") for name in BASELINES}
    assert all(table.table["song"].equals(songs.table["song"]) for table in tables.values())
    vectors = {"trained": songs.unit()} | {name: table.unit() for name, table in tables.items()}
    counts = nearest_song.count(songs.table, vectors, held_back_only=False)
    assert counts is not None, "the demo library has artists"
    stages = {s.does: {"seconds": round(s.seconds, 1), "cpu_seconds": round(s.cpu_seconds, 1)} for s in done.stages}
    return {
        "environment": machine.environment(torch.device("cpu")),
        "sentence": done.sentence,
        **dataclasses.asdict(counts),
        "stages": stages,
        "seconds": round(sum(s.seconds for s in done.stages), 1),
        "cpu_seconds": round(sum(s.cpu_seconds for s in done.stages), 1),
    }


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where libraries, shards and runs go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the results, added to seed by seed")
    args = parser.parse_args()
    for seed in args.seeds:
        if str(seed) in _read(args.json):
            continue
        found = measure(args.folder.resolve() / f"seed-{seed}", seed)
        results = _read(args.json) | {str(seed): found}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        print(f"seed {seed}: {found['sentence']}; {found['seconds']:.0f} s\n", flush=True)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


if __name__ == "__main__":
    main()
