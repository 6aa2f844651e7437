"""The console command `simsiam-dali COMMAND ...`, which starts one of the commands.

Each is also `python -m simsiam_dali.COMMAND`; only the one that is asked for is imported.
"""

import argparse
import importlib
import sys

import simsiam_dali
from simsiam_dali.common import shipped
from simsiam_dali.common.errors import one_line_errors
from simsiam_dali.config.cli import PROGRAM

COMMANDS = {
    "pack": "pack a folder of songs into WebDataset shards",
    "train": "train an encoder on the shards",
    "embed": "write a table with each song's tags and embedding",
    "evaluate": "score the embeddings: an HTML report, metrics and maps",
    "refresh": "embed new songs of the music folder, and regenerate the saved playlists",
    "recommend": "make playlists of similar or probably liked songs",
    "serve": "listen to the library on a local page: map, radio, ratings, playlists",
    "compare": "compare the best runs of each encoder type",
    "hpo": "search for better settings with Optuna",
    "export": "write a trained encoder as safetensors and ONNX",
    "benchmark": "measure samples/s of each stage on this machine",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the first word; each command parses the rest."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Self-supervised music embeddings: songs to shards, shards to an encoder, embeddings to playlists.",
        epilog=f"{PROGRAM} COMMAND --help shows a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {simsiam_dali.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


@one_line_errors
def main() -> None:
    """The console command."""
    command = build_parser().parse_args(sys.argv[1:2]).command
    sys.argv[:2] = [f"{PROGRAM} {command}"]
    if command == "benchmark":
        # The scripts of benchmarks/ import each other as top-level modules, and so do the processes they spawn, which
        # inherit sys.path.
        sys.path.insert(0, str(shipped.folder("benchmarks")))
        importlib.import_module("throughput").main()
    else:
        importlib.import_module(f"simsiam_dali.{command}").main()
