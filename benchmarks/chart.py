"""The results as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from result_text import figure as figure_text


def draw(doc: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: a point for each stage, for a sweep a line; whiskers reach to the lowest and the highest window.

    Points and not bars, whose lengths would mean nothing on the logarithmic axis that rates from 10 to 5,000 need.
    """
    env, stages = doc["environment"], doc["stages"]
    sweep = env["settings"]["sweep"]
    figure, axes = plt.subplots(figsize=(8, 4 if sweep else 0.8 + 0.4 * len(stages)), layout="constrained")
    if sweep:
        lines: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
        for name, entry in stages.items():
            kind, _, value = name.partition(f" {sweep}=")
            lines.setdefault(kind, []).append((value, entry))
        for kind, points in lines.items():
            rates = [e["samples_per_s"] for _, e in points]
            axes.errorbar(
                [v for v, _ in points], rates, _whiskers([e for _, e in points]), marker="o", capsize=3, label=kind
            )
        axes.set_xlabel(sweep)
        axes.set_ylabel("samples/s")
        axes.set_ylim(bottom=0)
        axes.legend()
    else:
        for y, (name, entry) in enumerate(stages.items()):
            colour, rate = "tab:orange" if name.startswith("baseline/") else "tab:blue", entry["samples_per_s"]
            axes.errorbar(rate, y, xerr=_whiskers([entry]), fmt="o", color=colour, capsize=3)
            axes.annotate(figure_text(rate), (entry["high"], y), (8, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(stages)), list(stages))
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.grid(alpha=0.3)
        axes.invert_yaxis()
        axes.set_xlabel("samples/s (one sample = two views)")
    axes.set_title(f"{env['gpu'] or env['cpu']}, {env['cores']} cores, {env['date']}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _whiskers(entries: list[Mapping[str, Any]]) -> list[list[float]]:
    return [[e["samples_per_s"] - e["low"] for e in entries], [e["high"] - e["samples_per_s"] for e in entries]]
