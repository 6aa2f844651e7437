"""Draw docs/real_music_map.png: songs that the encoder never heard, coloured by soundtrack, beside their MFCCs.

    python benchmarks/real_music/map.py --work DIR

Reads the tables that run.py left in --work. Both panels are t-SNE of the standardised vectors, by cosine; below each
stands how many songs have a nearest song of their own soundtrack.
"""

import argparse
from pathlib import Path

import halves
import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from run import FLOORS, OURS

from simsiam_dali import embeddings, maps, probes
from simsiam_dali.errors import UserError, one_line_errors

matplotlib.use("Agg")
from matplotlib.figure import Figure

LEARNED_FROM = "a"
"""The half that the encoder was trained on; the songs of the other are drawn."""


def nearest_is_of_the_soundtrack(vectors: np.ndarray, soundtracks: np.ndarray) -> np.ndarray:
    """BOOL `(N,)` for `vectors (N, D)`: whether a song's nearest other song, by cosine, has its soundtrack."""
    near, _ = probes.neighbours(vectors, np.arange(len(vectors)), 1)
    return soundtracks[near[:, 0]] == soundtracks


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("real_music"), metavar="DIR", help="run.py's (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=halves.ROOT / "docs" / "real_music_map.png", metavar="FILE",
                        help="the picture (default: docs/real_music_map.png)")  # fmt: skip
    args = parser.parse_args()
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    titles = {OURS: "SimSiam, trained on other songs", FLOORS["mfcc"]: "MFCCs (mean and std)"}
    for axes, (row, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        path = args.work / "tables" / f"{halves.slug(row)}-{LEARNED_FROM}-0.parquet"
        if not path.exists():
            raise UserError(f"no table {path}: make it with benchmarks/real_music/run.py --work {args.work}")
        songs = embeddings.read_songs(path)
        soundtracks = np.array([halves.soundtrack(own) for own in songs.table["path"]])
        names = sorted(set(soundtracks))
        points = maps.project(songs.vectors, seed=0)["t-SNE"]
        colours = matplotlib.colormaps["tab20"](np.linspace(0, 1, 20))[: len(names)]
        for name, colour in zip(names, colours, strict=True):
            own = points[soundtracks == name]
            axes.scatter(own[:, 0], own[:, 1], s=34, color=colour, linewidths=0)
        hits = nearest_is_of_the_soundtrack(songs.vectors, soundtracks)
        axes.set(
            xticks=[],
            yticks=[],
            title=title,
            xlabel=f"nearest song of the same soundtrack: {hits.sum()} of {len(hits)}",
        )
        axes.spines[:].set_color("#dddddd")
    handles = [Line2D([], [], ls="", marker="o", color=colour) for colour in colours]
    shown = [name.removesuffix("-music").removesuffix("-data") for name in names]
    figure.legend(handles, shown, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(args.out, dpi=110)
    print(args.out)


if __name__ == "__main__":
    main()
