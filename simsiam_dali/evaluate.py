"""Evaluate an embedding table: how well does a simple model predict ratings, artists, albums and genres from it?

    python -m simsiam_dali.evaluate --embeddings embeddings.parquet --out evaluation

Writes report.html (one page with everything), map.html (the interactive map), metrics.json and the maps as PNG, logs
them to the MLflow run that made the checkpoint, and prints a table. Each figure is shown beside that of a guess and of
each feature table in `baselines/` beside the embeddings, on the same songs and the same splits.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.common.files import refuse_failed_write, refuse_unwritable, replace_files
from simsiam_dali.config.cli import add_config, add_embeddings, create_parser, whole_number
from simsiam_dali.config.load import load_config
from simsiam_dali.embedding.table import read_same_songs, read_song_embeddings
from simsiam_dali.evaluation import maps, nearest_song, report
from simsiam_dali.evaluation.plan import GUESS, Options, evaluate
from simsiam_dali.models.registry import ENCODERS
from simsiam_dali.tracking.client import add_to_run, has_run

EMBEDDING = "embedding"
"""What the rows of the table to evaluate are called."""
FILES = ("report.html", "metrics.json", "map.html", "umap.png", "t-sne.png", "pca.png")


def baseline_files(given: list[str], beside: Path) -> dict[str, Path]:
    """NAME=FILE of the command line, else every table that `embed --baselines` wrote, called by its file's name."""
    if not given:
        return {path.stem: path for path in sorted((beside / "baselines").glob("*.parquet"))}
    files = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not (name and sign and path):
            raise UserError(f"--baseline {text}: expected NAME=FILE, such as mfcc=baselines/mfcc.parquet")
        if name in (EMBEDDING, GUESS):
            raise UserError(f"--baseline {text}: {name} is a row of the report already, choose another name")
        files[name] = Path(path)
    return files


def find_run(args: argparse.Namespace, provenance: Mapping[str, str]) -> tuple[Callable[..., None] | None, str]:
    """`add_to_run` of the MLflow run to log to, or None, and a line that names the run or tells why there is none."""
    trained_with = {"mlflow": {"tracking_uri": provenance["tracking_uri"]}} if provenance.get("tracking_uri") else None
    given = {"mlflow.tracking_uri": args.tracking_uri}
    config = load_config(args.config, os.environ, given, args.assignments, base=trained_with).mlflow
    run_id = args.run_id or provenance.get("mlflow_run")
    if args.no_mlflow or not config.enabled:
        return None, "not logged to MLflow: switched off"
    if not run_id:
        return None, "not logged to MLflow: the embeddings name no run (--run-id names one)"
    if has_run(config.tracking_uri, run_id):
        return partial(add_to_run, config.tracking_uri, run_id), f"logged to run {run_id} of {config.tracking_uri}"
    missing = f"{config.tracking_uri} has no run {run_id}"
    if args.run_id:
        raise UserError(f"{missing}: correct --run-id or --tracking-uri, or leave it out with --no-mlflow")
    return None, f"not logged to MLflow: {missing} (--tracking-uri names another place)"


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = create_parser("evaluate", __doc__)
    add, default = parser.add_argument, Options()

    def number(option: str, default: int, least: int, text: str) -> None:
        add(option, type=whole_number(least), default=default, metavar="N", help=f"{text} (default: %(default)s)")

    add_embeddings(parser)
    add(
        "--baseline", action="append", default=[], metavar="NAME=FILE", dest="baselines",
        help="features of the same songs to compare with; may be repeated (default: every table in baselines/ beside"
        " the embeddings)",
    )  # fmt: skip
    add("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="folder to write (default: %(default)s)")
    add("--replace", action="store_true", help="write over an earlier evaluation in --out")
    number("--k", default.k, 1, "neighbours of the k-NN probe")
    number("--class-songs", default.class_songs, 2, "songs that an artist, album or genre needs to be a class")
    number("--classes", default.classes, 2, "classes that are scored, the largest first")
    number("--resamples", default.resamples, 10, "resamples of the bootstrap intervals")
    number("--seed", default.seed, 0, "random seed of the bootstrap, the MLP and the maps")
    add("--no-maps", action="store_true", help="skip t-SNE, UMAP and the interactive map")
    add("--run-id", metavar="ID", help="MLflow run to log to (default: the one that made the checkpoint)")
    add("--tracking-uri", metavar="URI", help="MLflow's tracking URI (mlflow.tracking_uri; default: the training's)")
    add("--no-mlflow", action="store_true", help="log nothing to MLflow")
    add_config(parser, "YAML settings, of which only mlflow's are used")
    return parser


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    options = Options(args.k, args.class_songs, args.classes, args.resamples, args.seed)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file: name a folder")
    if not args.replace and any((args.out / name).exists() for name in FILES):
        raise UserError(f"{args.out} holds an evaluation already: give --replace to write over it, or another --out")
    refuse_unwritable(args.out)
    songs = read_song_embeddings(args.embeddings)
    baselines = baseline_files(args.baselines, args.embeddings.parent)
    tables = {EMBEDDING: songs} | {name: read_same_songs(path, songs) for name, path in baselines.items()}
    vectors = {name: own.vectors for name, own in tables.items()}
    unit_vectors = {name: own.unit() for name, own in tables.items()}
    log, logged = find_run(args, songs.provenance)

    encoder_type = ENCODERS.get(songs.provenance.get("encoder_type", ""))
    learns_from_tags = encoder_type is not None and encoder_type.learns_from_tags
    evaluation = evaluate(songs.table, vectors, unit_vectors, options, learns_from_tags)
    held_back = int((songs.table["split"] == "val").sum())
    provenance = {
        "songs": len(songs.table),
        "held back": held_back,
        "dimensions": songs.vectors.shape[1],
        "compared": "normalised within songs" if songs.within else "half-whitened",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "embeddings": str(args.embeddings),
        "made by": songs.provenance,
        "baseline": {name: str(path) for name, path in baselines.items()},
        "MLflow": logged,
        "command": shlex.join(["python", "-m", "simsiam_dali.evaluate", *sys.argv[1:]]),
    }
    files: dict[str, bytes] = {}
    pictures: dict[str, bytes] = {}
    page = None
    if not args.no_maps:
        print("drawing the maps", flush=True)
        projections = maps.project(unit_vectors[EMBEDDING], options.seed)
        pictures = {name: maps.picture(points, songs.table, name) for name, points in projections.items()}
        page = report.map_page(maps.page_data(songs.table, unit_vectors[EMBEDDING], projections))
        files = {f"{name.lower()}.png": png for name, png in pictures.items()} | {"map.html": page.encode()}
    files["report.html"] = report.page(evaluation, provenance, options, pictures, page).encode()
    files["metrics.json"] = report.as_json(evaluation, provenance, options).encode()
    with refuse_failed_write(args.out):
        replace_files(args.out, files, gone=set(FILES) - set(files))

    for line in report.terminal_table(evaluation):
        print(line)
    if any(f.songs == "unseen" for f in evaluation.figures):
        why = ", and only that judges an encoder that learned from tags or ratings" if learns_from_tags else ""
        print(f"the same for the {held_back} songs held back from the training: in the report{why}")
    if line := nearest_song.sentence(songs.table, unit_vectors, learns_from_tags):
        print(line)
    print(f"report  {args.out / 'report.html'}")
    if log:  # last, so that a server that goes away costs no figure
        values = {f.name: f.score.value for f in evaluation.figures} | report.classifier_metrics(evaluation)
        log(values, [args.out / name for name in files], "evaluation")
    print(f"MLflow  {logged}")


if __name__ == "__main__":
    main()
