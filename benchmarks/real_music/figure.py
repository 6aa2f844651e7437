"""The differences of a comparison at equal time from the recipe, with their intervals, as an SVG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from equal_time_scores import BASE, METRICS, by_seed, difference, for_every_seed, interval, of_songs
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TITLES = dict(zip(METRICS, ("5-NN", "mAP@10"), strict=True))
TRAINED, BASELINE = "#1f5fa8", "#8a8a8a"
ROW_HEIGHT = 0.34
"""Inches."""


def draw(doc: Mapping[str, Any], source: str, out: Path) -> None:
    """Draw what equal_time.py wrote. source: its file's name, which the drawing keeps."""
    soundtracks, base = of_songs(doc, "soundtracks"), doc["scores"][BASE]
    others = {row: own for row, own in doc["scores"].items() if row != BASE}
    rows = {**others, **{row: for_every_seed(own, base) for row, own in doc["baselines"].items()}}
    # The same file from the same scores: no date, no random ids. Text as outlines, for hosts without the font.
    with matplotlib.rc_context({"svg.hashsalt": "differences", "svg.fonttype": "path", "font.size": 9}):
        height = 1.1 + ROW_HEIGHT * len(rows)
        figure = Figure(figsize=(8.5, height), layout="constrained", facecolor="white")
        for axes, (metric, title) in zip(figure.subplots(1, 2, sharey=True), TITLES.items(), strict=True):
            axes.axvline(0, color="black", linewidth=0.8)
            for place, (row, own) in enumerate(rows.items()):
                gap = difference(own, base, metric)
                if gap is None:
                    continue
                (low, high), mean = interval(gap, soundtracks), gap.mean()
                colour = TRAINED if row in others else BASELINE
                axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
            mean = np.mean([each.mean() for each in by_seed(base, metric).values()])
            axes.set_title(f"{title}, minus {BASE}'s {mean:.3f}", fontsize=9)
            axes.set_yticks(range(len(rows)), list(rows))
            axes.xaxis.set_major_locator(MaxNLocator(5))  # labels of more run into each other
            axes.grid(axis="x", color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(left=False)
        axes.invert_yaxis()  # of both, which share it
        figure.savefig(out, metadata={"Date": None, "Source": source})
