"""Evaluate an embedding table: what can a simple model read out of it about ratings, artists, albums and genres?

    python -m simsiam_dali.evaluate --embeddings embeddings.parquet --out evaluation

Writes report.html (one page with everything), map.html (the interactive map), metrics.json and the maps as PNG, logs
them to the MLflow run that made the checkpoint, and prints a table. Beside each figure stands what a guess reaches, and
what each feature table in `floors/` beside the embeddings reaches, on the same songs and the same splits.
"""

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.common.shipped import config_file
from simsiam_dali.config.cli import program
from simsiam_dali.config.load import load_config
from simsiam_dali.embedding import table as embeddings
from simsiam_dali.embedding.table import Embeddings
from simsiam_dali.evaluation import maps, nearest_song, report
from simsiam_dali.evaluation import plan as evaluation
from simsiam_dali.evaluation.plan import Options
from simsiam_dali.models import registry as encoders
from simsiam_dali.tracking.finished import FinishedRun

FLOORS = "floors"
ARTIFACTS = "evaluation"
"""Folder of the run's artifacts."""


def floor_files(given: list[str], beside: Path) -> dict[str, Path]:
    """NAME=FILE of the command line, else every table in `floors/` beside the embeddings, called by its file's name."""
    if not given:
        return {path.stem: path for path in sorted((beside / FLOORS).glob("*.parquet"))}
    files = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not (name and sign and path) or name == evaluation.GUESS:
            raise UserError(f"--floor {text}: expected NAME=FILE, such as mfcc=floors/mfcc.parquet")
        files[name] = Path(path)
    return files


def matched(path: Path, songs: Embeddings) -> np.ndarray:
    """The vectors of a floor `(N, D)` in the order of the songs; refused when it is of other songs."""
    floor = embeddings.read_songs(path)
    shards = songs.about.get("shards"), floor.about.get("shards")
    if all(shards) and shards[0] != shards[1]:
        raise UserError(f"{path} is of other shards than the embeddings: make it again from the same shards")
    row = {song: i for i, song in enumerate(floor.table["song"])}
    if set(row) != set(songs.table["song"]):
        raise UserError(
            f"{path} has {len(row)} songs, not the {len(songs.table)} of the embeddings: make it from the same songs"
        )
    return floor.vectors[[row[song] for song in songs.table["song"]]]


def write(out: Path, files: Mapping[str, str | bytes]) -> None:
    """Write all files into a folder beside `out`, then move them in: a failure leaves what was there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as part:
        for name, content in files.items():
            (Path(part) / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        out.mkdir(exist_ok=True)
        for name in files:
            (Path(part) / name).replace(out / name)


def find_run(args: argparse.Namespace, about: Mapping[str, str]) -> tuple[FinishedRun | None, str]:
    """(the MLflow run to log to, or None; a line that says which or why none)."""
    trained_with = {"mlflow": {"tracking_uri": about["tracking_uri"]}} if about.get("tracking_uri") else None
    given = {"mlflow.tracking_uri": args.tracking_uri}
    config = load_config(args.config, os.environ, given, args.assignments, base=trained_with).mlflow
    run_id = args.run_id or about.get("mlflow_run")
    if args.no_mlflow or not config.enabled:
        return None, "not logged to MLflow: switched off"
    if not run_id:
        return None, "not logged to MLflow: the embeddings name no run (--run-id names one)"
    if run := FinishedRun.find(config.tracking_uri, run_id):
        return run, f"logged to run {run_id} of {config.tracking_uri}"
    missing = f"{config.tracking_uri} has no run {run_id}"
    if args.run_id:
        raise UserError(f"{missing}: correct --run-id or --tracking-uri, or leave it out with --no-mlflow")
    return None, f"not logged to MLflow: {missing} (--tracking-uri names another place)"


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = argparse.ArgumentParser(
        prog=program("evaluate"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def number(option: str, default: int, least: int, text: str) -> None:
        def parse(value: str) -> int:
            if int(value) < least:
                raise argparse.ArgumentTypeError(f"{value} is below {least}")
            return int(value)

        parse.__name__ = "int"
        parser.add_argument(option, type=parse, default=default, metavar="N", help=f"{text} (default: %(default)s)")

    add, default = parser.add_argument, Options()
    add(
        "--embeddings", type=Path, default=Path("embeddings.parquet"), metavar="FILE",
        help="table written by python -m simsiam_dali.embed (default: %(default)s)",
    )  # fmt: skip
    add(
        "--floor", action="append", default=[], metavar="NAME=FILE", dest="floors",
        help="features of the same songs to compare with; may be repeated (default: every table in floors/ beside the"
        " embeddings)",
    )  # fmt: skip
    add("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="folder to write (default: %(default)s)")
    add("--replace", action="store_true", help="write over an earlier evaluation in --out")
    number("--k", default.k, 1, "neighbours of the k-NN probe")
    number("--class-songs", default.class_songs, 2, "songs that an artist, album or genre needs to be a class")
    number("--classes", default.classes, 2, "classes that are scored, the largest first")
    number("--resamples", default.resamples, 10, "resamples of the bootstrap intervals")
    number("--seed", default.seed, 0, "of the bootstrap, the MLP and the maps")
    add("--no-maps", action="store_true", help="leave t-SNE, UMAP and the interactive map out")
    add("--run-id", metavar="ID", help="MLflow run to log to (default: the one that made the checkpoint)")
    add("--tracking-uri", metavar="URI", help="of MLflow (mlflow.tracking_uri; default: the training's)")
    add("--no-mlflow", action="store_true", help="log nothing to MLflow")
    add("--config", type=config_file, metavar="FILE", help="YAML settings, of which only mlflow's are used")
    add("--set", action="append", default=[], metavar="a.b=c", dest="assignments", help="any setting by its dotted key")
    return parser


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    options = Options(args.k, args.class_songs, args.classes, args.resamples, args.seed)
    names = ("report.html", "metrics.json", "map.html", "umap.png", "t-sne.png", "pca.png")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file: name a folder")
    if not args.replace and any((args.out / name).exists() for name in names):
        raise UserError(f"{args.out} holds an evaluation already: choose another --out, or --replace it")
    songs = embeddings.read_songs(args.embeddings)
    floors = floor_files(args.floors, args.embeddings.parent)
    vectors = {"embedding": songs.vectors} | {name: matched(path, songs) for name, path in floors.items()}
    run, logged = find_run(args, songs.about)

    def progress(probes: list[evaluation.Probe]) -> Any:
        bar = tqdm(probes, unit="probe", leave=False)
        for probe in bar:
            bar.set_description(f"{probe.target}, {probe.name}, split by {probe.split}")
            yield probe

    done = evaluation.evaluate(songs.table, vectors, options, progress)
    provenance = {
        "songs": len(songs.table),
        "held back": int((songs.table["split"] == "val").sum()),
        "dimensions": songs.vectors.shape[1],
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "embeddings": str(args.embeddings),
        "made by": songs.about,
        "floor": {name: str(path) for name, path in floors.items()},
        "MLflow": logged,
        "command": shlex.join(["python", "-m", "simsiam_dali.evaluate", *sys.argv[1:]]),
    }
    files: dict[str, str | bytes] = {}
    pictures: dict[str, bytes] = {}
    if not args.no_maps:
        print("drawing the maps", flush=True)
        flat = maps.project(songs.vectors, options.seed)
        pictures = {name: maps.picture(points, songs.table, name) for name, points in flat.items()}
        files |= {f"{name.lower()}.png": png for name, png in pictures.items()}
        files["map.html"] = report.map_page(maps.page_data(songs.table, songs.vectors, flat))
    map_html = str(files["map.html"]) if "map.html" in files else None
    files["report.html"] = report.page(done, provenance, options, pictures, map_html)
    files["metrics.json"] = report.as_json(done, provenance, options)
    write(args.out, files)
    if run:
        run.log_metrics({f.name: f.score.value for f in done.figures} | report.classifier_metrics(done))
        for name in files:
            run.log_artifact(args.out / name, ARTIFACTS)

    for line in report.terminal_table(done):
        print(line)
    if any(f.songs == "unseen" for f in done.figures):
        print(f"the same for the {provenance['held back']} songs held back from the training: in the report")
    kind = encoders.ENCODERS.get(songs.about.get("encoder_type", ""))
    if line := nearest_song.sentence(songs.table, vectors, kind is not None and kind.learns_from_tags):
        print(line)
    print(f"MLflow  {logged}")
    print(f"report  {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
