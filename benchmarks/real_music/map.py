"""Draw docs/real_music_map.svg, the map in the README: python benchmarks/real_music/map.py

The songs of one half, as t-SNE of the unit vectors that an encoder trained on the other half gives them by stages,
coloured by soundtrack; beside it the same songs by the best baseline. Below each map stands for how many songs the vote
of the 5 nearest names the soundtrack, as run.py counts it. Takes run.py's first training from --work, or fetches, packs
and trains (about 20 minutes on two busy cores) where it is not there yet.
"""

import argparse
import itertools
import os
from collections import Counter
from pathlib import Path

import halves
import matplotlib
import numpy as np
import run
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simsiam_dali.common.errors import one_line_errors
from simsiam_dali.embedding.table import read_song_embeddings
from simsiam_dali.evaluation import maps

GAMES = {
    "adonthell-data": "Adonthell",
    "asc-music": "Adv. Strategic Command",
    "btanks-data": "Battle Tanks",
    "drascula-music": "Drascula",
    "frozen-bubble-data": "Frozen-Bubble",
    "hyperrogue-music": "HyperRogue",
    "lincity-ng-data": "LinCity-NG",
    "singularity-music": "Endgame: Singularity",
    "supertux-data": "SuperTux",
    "warzone2100-music": "Warzone 2100",
    "wesnoth-1.16-music": "Battle for Wesnoth",
}
"""The packages of fetch.sh, as their games are called."""
STYLES = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#e69f00", "v"),
    ("#56b4e9", "P"),
    ("#882255", "X"),
    ("#999933", "<"),
    ("#332288", ">"),
    ("#117733", "h"),
    ("#444444", "*"),
)
"""Colour and marker, the largest soundtrack first: of 11 colours some look alike to many, so no two share a marker.
The first six are of Okabe and Ito (2008), the next four of Paul Tol's "muted" scheme."""


def named(table: Path) -> np.ndarray:
    """BOOL `(N,)`: whether a song's 5 nearest name its soundtrack, of the N songs that are not alone in theirs."""
    return run.of_each_song(table)["soundtrack/knn"] > 0


def draw_map(axes: Axes, table: Path, packages: list[str]) -> None:
    """The songs of `table`, in the styles that the order of `packages` gives them."""
    songs = read_song_embeddings(table)
    points = maps.project(songs.unit(), seed=0)["t-SNE"]
    own = np.array([halves.soundtrack(path) for path in songs.table["path"]])
    for package, (colour, marker) in zip(packages, itertools.cycle(STYLES), strict=False):
        x, y = points[own == package].T
        label = f"{GAMES.get(package, package)} ({len(x)})"
        axes.scatter(x, y, s=80 if marker in "*PX" else 46, c=colour, marker=marker, lw=0.7, ec="white", label=label)
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.06)
    axes.spines[:].set_color("#cccccc")


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path("real_music"), metavar="DIR", help="run.py's folder (default: %(default)s)")
    add("--music", type=Path, metavar="DIR", help="where fetch.sh puts the music (default: WORK/music)")
    out = halves.ROOT / "docs" / "real_music_map.svg"
    add("--out", type=Path, default=out, metavar="FILE", help="SVG, PNG or PDF (default: docs/real_music_map.svg)")
    args = parser.parse_args()
    work = args.work.resolve()
    job = next(run.plan(seeds=1))
    if job.missing(work):
        shards = halves.prepare(work, (args.music or work / "music").resolve())
        config = halves.ROOT / "configs" / "real_music_cpu.yaml"
        cores = len(os.sched_getaffinity(0))  # side by side: a training of run.py has one core, and so has this one
        halves.run_all([job], shards, work, config, torch.device("cpu"), side_by_side=cores)

    tables = {row: job.table(work, row) for row in job.tables}
    right = {row: named(table) for row, table in tables.items()}
    best = max(run.BASELINES, key=lambda row: right[row].mean())
    paths = read_song_embeddings(tables[run.STAGES]).table["path"]
    packages = [package for package, _ in Counter(map(halves.soundtrack, sorted(paths))).most_common()]
    figures = {row: f"{right[row].sum()} of {len(right[row])}" for row in (run.STAGES, best)}
    caption = (
        f"{len(paths)} songs never heard in training, coloured by soundtrack, which the encoder never saw. The vote of"
        f" the five nearest songs names the right soundtrack for {figures[run.STAGES]} that are not alone in theirs, by"
        f" the best baseline ({best}) for {figures[best]}."
    )
    # The same file from the same tables: no date, no random ids. Text as outlines, for hosts without the font.
    matplotlib.rcParams.update({"svg.hashsalt": "map", "svg.fonttype": "path", "font.size": 10})
    figure = Figure(figsize=(10, 5.6), layout="constrained", facecolor="white")
    titles = {run.STAGES: "SimSiam, trained on other songs", best: f"the best baseline: {best}"}
    for axes, (row, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        draw_map(axes, tables[row], packages)
        axes.set_title(title, fontsize=12)
        axes.set_xlabel(f"the five nearest songs name the right soundtrack for {figures[row]}")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, borderaxespad=0.2)
    metadata = {"Title": caption, "Date": None} if args.out.suffix == ".svg" else {}
    figure.savefig(args.out, dpi=150, metadata=metadata)
    print(f"{args.out}: {caption}")


if __name__ == "__main__":
    main()
