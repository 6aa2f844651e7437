"""The results as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from report import figure as figure_text


def draw(doc: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: a bar for each stage, for a sweep a line; whiskers reach to the lowest and the highest window."""
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
        entries = list(stages.values())
        rates = [e["samples_per_s"] for e in entries]
        colours = ["tab:orange" if name.startswith("baseline/") else "tab:blue" for name in stages]
        bars = axes.barh(list(stages), rates, xerr=_whiskers(entries), color=colours, capsize=3)
        axes.bar_label(bars, [figure_text(rate) for rate in rates], padding=6)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set_xlabel("samples/s (one sample = two views)")
    axes.set_title(f"{env['gpu'] or env['cpu']}, {env['cores']} cores, {env['date']}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _whiskers(entries: list[Mapping[str, Any]]) -> list[list[float]]:
    return [[e["samples_per_s"] - e["low"] for e in entries], [e["high"] - e["samples_per_s"] for e in entries]]
