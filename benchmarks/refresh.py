"""What a refresh costs: `python benchmarks/refresh.py --run RUN --music DIR --json FILE`.

Two parts; every step is the command in a process of its own, timed from its start to its end, so imports are in it:

    made     a table of --songs made rows by RUN, as many empty files with the sizes and times of its records, and
             three saved playlists. `nothing`: there is nothing to do. `gone`: one file in a hundred has gone. `after`:
             nothing to do again.
    real     links to the songs of DIR. `all`: all but every tenth are embedded, from nothing. `hundredth`: one song in
             a hundred more, then `tenth`: the rest of every tenth. `nothing`: there is nothing to do.

CPU seconds are the command's own, without its decoding processes; they depend less on what else runs on the machine
than seconds do.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pandas as pd
import torch
from large_library import song_names

from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.common.files import sha256_of
from simsiam_dali.embedding.features import CHECKPOINT
from simsiam_dali.embedding.records import FileRecord, Records, records_path, write_records
from simsiam_dali.embedding.run import read_run
from simsiam_dali.embedding.table import Embeddings, write_embeddings
from simsiam_dali.embedding.write import embedding_config, table_provenance
from simsiam_dali.evaluation.within_song import WithinSong
from simsiam_dali.packing.find import SongFile, find_songs
from simsiam_dali.recommendation.choose import Request
from simsiam_dali.recommendation.library import Library
from simsiam_dali.recommendation.saved import save

WIDTH = 512
MTIME_NS = 1_700_000_000_000_000_000


def lay_out(home: Path, run: str, songs: int) -> None:
    """`music/`, `e.parquet` with its records, and `playlists/`, all made."""
    names, rng = sorted(song_names(songs)), np.random.default_rng(0)
    for name in names:
        path = home / "music" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, ns=(MTIME_NS, MTIME_NS))
    trained = read_run(run)
    columns = {
        "song": np.arange(songs),
        "path": names,
        "title": [f"{Path(name).stem} {number}" for number, name in enumerate(names)],
        "artists": [[name.split("/")[0]] for name in names],
        "albums": [[name.split("/")[1]] for name in names],
        "album_artist": [name.split("/")[0] for name in names],
        "year": pd.array([1960 + number % 65 for number in range(songs)], "Int64"),
        "genres": [["Rock"]] * songs,
        "rating": np.full(songs, np.nan),
        "duration": rng.uniform(120, 400, songs),
        "split": ["train"] * songs,
    }
    settings = trained.packing.decode
    files = {name: FileRecord(name, 0, MTIME_NS, rng.bytes(32).hex()) for name in names}
    records = Records("", settings, files)
    config = embedding_config(trained.config, settings.segment_seconds)
    made_by = table_provenance(CHECKPOINT, "songs", trained, str(home / "music"), records.fingerprint)
    made_by["view_seconds"] = f"{config.data.view_seconds:g}"
    vectors = rng.standard_normal((songs, WIDTH), dtype=np.float32)
    within = WithinSong.of_segments(rng.standard_normal((6000, WIDTH)), np.repeat(np.arange(2000), 3))
    table = Embeddings(pd.DataFrame(columns), vectors, made_by, within)
    write_embeddings(home / "e.parquet", table)
    write_records(records_path(home / "e.parquet"), Records(records.fingerprint, settings, files))
    library = Library(table.table, home / "music")
    for number in range(3):
        request = Request(like=[str(home / "music" / names[number * songs // 3])])
        save(home / "playlists", f"playlist {number}", request, library, table.unit())


def refresh(home: Path, run: str) -> dict[str, float]:
    """Run the command; its seconds and CPU seconds."""
    words = [sys.executable, "-m", "simsiam_dali.refresh", home / "music", "--checkpoint", run]
    words += ["--out", home / "e.parquet", "--playlists", home / "playlists"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(list(map(str, words)), check=True, stderr=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}


def sums(home: Path) -> dict[str, tuple[str, int]]:
    """Checksum and modification time of the table, its records, and every playlist."""
    files = [home / "e.parquet", records_path(home / "e.parquet"), *sorted((home / "playlists").glob("*"))]
    return {path.name: (sha256_of(path), path.stat().st_mtime_ns) for path in files}


def nothing_to_do(home: Path, run: str) -> dict[str, float]:
    """A refresh that must not write anything."""
    before = sums(home)
    result = refresh(home, run)
    if sums(home) != before:
        raise AssertionError("there was nothing to do, and a file was written")
    return result


def measure_made(home: Path, run: str, songs: int) -> dict[str, Any]:
    """The steps of `made`."""
    lay_out(home, run, songs)
    steps = {"nothing": nothing_to_do(home, run)}
    for file in find_songs(home / "music")[0][::100]:
        file.path.unlink()
    steps["gone"] = refresh(home, run)
    steps["after"] = nothing_to_do(home, run)
    return {"songs": songs, "width": WIDTH, "playlists": 3, "steps": steps}


def songs_of(music: Path) -> list[SongFile]:
    """The songs of a folder. Raises UserError where a hundredth of them is none."""
    files = find_songs(music.absolute())[0]
    if len(files) < 100:
        raise UserError(f"--music {music}: {len(files)} songs, at least 100 are needed")
    return [*files]


def measure_real(home: Path, run: str, music: Path) -> dict[str, Any]:
    """The steps of `real`."""
    files = songs_of(music)
    parts = {"hundredth": files[::100], "tenth": [file for file in files[::10] if file not in files[::100]]}
    later = {file.name for part in parts.values() for file in part}
    parts = {"all": [file for file in files if file.name not in later], **parts}
    steps: dict[str, dict[str, float]] = {}
    for name, part in parts.items():
        for file in part:
            link = home / "music" / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.path)
        steps[name] = {"files": len(part), **refresh(home, run)}
    steps["nothing"] = nothing_to_do(home, run)
    return {"files": len(files), "steps": steps}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="refresh.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", required=True, metavar="RUN", help="a run's folder, or a checkpoint")
    add("--songs", type=int, default=100_000, metavar="N", help="made songs, 0 = none (default: %(default)s)")
    add("--music", type=Path, metavar="DIR", help="real songs; without it, only the made ones are measured")
    add("--scratch", type=Path, metavar="DIR", help="where to work; 1 GB for 100,000 songs (default: /tmp or TMPDIR)")
    add("--json", type=Path, metavar="F", help="write the results here")
    return parser


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    if args.music:
        songs_of(args.music)  # too few are refused before anything is measured
    doc: dict[str, Any] = {"environment": machine.environment(torch.device("cpu"))}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        if args.songs:
            (Path(scratch) / "made").mkdir()
            doc["made"] = measure_made(Path(scratch) / "made", args.run, args.songs)
        if args.music:
            (Path(scratch) / "real").mkdir()
            doc["real"] = measure_real(Path(scratch) / "real", args.run, args.music)
    doc["load_average"] = os.getloadavg()[0]
    print(json.dumps(doc, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(doc, indent=1) + "\n")


if __name__ == "__main__":
    main()
