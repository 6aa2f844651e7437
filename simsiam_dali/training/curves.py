"""The plot of a run: loss, collapse gauges and kNN scores over the epochs, each beside its reference value."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from simsiam_dali.common.files import atomic_write

matplotlib.use("Agg")


def draw(epochs: list[dict[str, Any]], output_dim: int, path: Path) -> None:
    """Draw `runs/<name>/curves.png` from the epoch records of metrics.jsonl."""
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    loss, spread, score = figure.subplots(1, 3)
    panels = (
        (loss, "loss", ("encoder/train_loss", "encoder/val_loss")),
        (spread, "collapse gauges", ("encoder/z_std",)),
        (score, "online kNN on validation songs", ("knn/artist", "knn/genre")),
    )
    for axes, title, names in panels:
        axes.set_title(title)
        axes.set_xlabel("epoch")
        for name in names:
            points = [(e["epoch"], e[name]) for e in epochs if e.get(name) is not None]
            if points:
                (line,) = axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else "")
                chance = next((e[f"{name}_chance"] for e in epochs if e.get(f"{name}_chance") is not None), None)
                if chance is not None:
                    axes.axhline(chance, color=line.get_color(), ls=":", lw=1, label=f"{name}: a guess")
    spread.axhline(output_dim**-0.5, color="gray", ls="--", lw=1, label="healthy: 1/sqrt(d)")
    spread.set_ylim(0, 1.4 * output_dim**-0.5)
    rank = spread.twinx()
    points = [(e["epoch"], e["encoder/effective_rank"]) for e in epochs if e.get("encoder/effective_rank") is not None]
    if points:
        rank.plot(*zip(*points, strict=True), color="tab:green", label="effective rank (right)")
        rank.legend(fontsize=7, loc="lower right")
    rank.set_ylim(bottom=0)
    for axes in (loss, spread, score):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, loc="lower left" if axes is spread else "best")
    with atomic_write(path) as part:
        figure.savefig(part, dpi=110, format="png")
