"""A comparison as lines for the terminal, as CSV and as a plot."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import atomic_write, refuse_failed_write
from simsiam_dali.common.table import table_lines
from simsiam_dali.evaluation.compare_runs import AB_TYPES, BASELINES, METRICS, Comparison, Metric

if TYPE_CHECKING:  # pandas takes longer to import than the command's help takes
    import pandas as pd

MARK = "simsiam_dali.compare"
"""Software tag in the plot's metadata, by which a later comparison may replace the file."""

ADVICE = "choose another file with --csv or --png"

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
PANELS_PER_ROW = 4


def logged_metrics(comparison: Comparison) -> list[Metric]:
    """The metrics that any selected run has."""
    return [m for m in METRICS if comparison.runs[m.name].notna().any()]


def table(comparison: Comparison) -> list[str]:
    """One column per type, one row per metric; below a score its baselines, and of how many songs it is."""
    runs = comparison.runs["encoder_type"].value_counts()
    rows = [["runs", *(f"{runs[t]} of {n}" for t, n in comparison.candidates.items()), "", ""]]
    for metric in logged_metrics(comparison):
        better = metric.better if metric.comparable else "not comparable between types"
        ahead, ranges = comparison.ahead(metric)
        rows.append([metric.name, *cells(comparison, metric.name), better, ahead + (ranges and f", ranges {ranges}")])
        for label, column in baselines(comparison, metric):
            rows.append([f"  {label}", *cells(comparison, column), "", ""])
        songs = f"{metric.name}_songs"
        if songs in comparison.runs and comparison.runs[songs].notna().any():
            row = ["  songs scored", *cells(comparison, songs), "", ""]
            if row not in rows:  # those of classifier/* are the same
                rows.append(row)
    return table_lines(["", *comparison.candidates, "better", "ahead"], rows)


def cells(comparison: Comparison, column: str) -> Iterator[str]:
    """Of each type a value, or a mean with its range; and the number of runs that have it where not all do."""
    for runs, n, mean, low, high in comparison.spread(column).to_numpy():
        incomplete = f", n={n:.0f}" if n < runs else ""
        if n == 0:
            yield "-"
        elif low == high:
            yield f"{mean:.4g}{incomplete}"
        else:
            yield f"{mean:.4g} ({low:.4g} to {high:.4g}{incomplete})"


def baselines(comparison: Comparison, metric: Metric) -> Iterator[tuple[str, str]]:
    """(label, column) of the baselines that any run has of a metric: chance, and the untrained encoder."""
    for label in BASELINES:
        column = f"{metric.name}_{label}"
        if column in comparison.runs and comparison.runs[column].notna().any():
            yield label, column


def notes(comparison: Comparison) -> Iterator[str]:
    """How the runs were selected, what is missing, and how far a difference can be trusted."""
    yield from comparison.notes
    candidates, by = comparison.candidates, comparison.by
    if len(candidates) == 1:
        (only,) = candidates
        other = next(t for t in AB_TYPES if t != only)
        yield f"no {other} run to compare with {only}: python -m simsiam_dali.train --encoder-type {other}"
        return
    runs = comparison.runs["encoder_type"].value_counts(sort=False)
    if runs.min() == 1:
        single = "one run each" if runs.max() == 1 else f"one run of {runs.idxmin()}"
        yield f"{single}: the difference may be chance; train with --seed 1, 2, ..., then compare --runs 0"
    selected = any(runs[t] < n for t, n in candidates.items())
    if selected and len(set(candidates.values())) > 1:
        yield "the best of more runs is better by chance alone: --runs 0 compares all runs of each type"
    if by and len(candidates) == 2 and not selected:
        m, n = comparison.spread(by.name)["count"]
        _, ranges = comparison.ahead(by)
        if ranges == "disjoint":
            # Under the null hypothesis all splits of m + n values into m and n are equally likely; two are disjoint.
            chance = f"which has probability {2 / math.comb(m + n, m):.1%} for two equal types"
            yield f"{by.name}: the ranges of {m} and {n} runs are disjoint, {chance}"
        elif ranges == "overlap":
            yield f"{by.name}: the ranges overlap, so these runs do not show which type is better"


def mlflow_filters(comparison: Comparison) -> list[str]:
    """Search strings for the MLflow UI: the shown runs; with several types, then those of each type alone.

    By their ids: no other condition leaves out hpo's trials, runs on other shards and all but the best.
    """

    def of(runs: "pd.DataFrame") -> str:
        ids = ", ".join(f"'{run_id}'" for run_id in runs["run_id"])
        return f"attributes.run_id IN ({ids})"

    own = {t: comparison.runs[comparison.runs["encoder_type"] == t] for t in comparison.candidates}
    of_types = [f'tags.encoder_type = "{t}" AND {of(runs)}' for t, runs in own.items()]
    return [of(comparison.runs), *(of_types if len(own) > 1 else ())]


def check_replaceable(path: Path) -> None:
    """Raise UserError when `path` exists and was not written by this command."""
    if path.exists():
        with refuse_failed_write(path, ADVICE), path.open("rb") as file:
            head = file.read(1024)
        if head and not head.startswith(b"encoder_type,run_name,run_id,") and MARK.encode() not in head:
            raise UserError(f"{path} exists and is not a comparison: {ADVICE}")


@contextmanager
def _replace(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path`, whose folder is created."""
    with refuse_failed_write(path, ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            yield part


def write_csv(comparison: Comparison, path: Path) -> None:
    """One row per run: its identity, each metric, and the baselines of the kNN scores; empty for a missing value."""
    with _replace(path) as part:
        comparison.runs.to_csv(part, index=False, lineterminator="\r\n")


def write_png(comparison: Comparison, path: Path) -> None:
    """One panel per metric: a bar per type (its mean), a point per run, baselines as lines."""
    from matplotlib.figure import Figure

    metrics = logged_metrics(comparison)
    columns = min(PANELS_PER_ROW, len(metrics))
    lines = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(3.1 * columns, 2.7 * lines + 0.5), layout="constrained")
    for i, metric in enumerate(metrics):
        _panel(figure.add_subplot(lines, columns, i + 1), comparison, metric)
    named = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    legend = {label: handle for of_panel in named for handle, label in of_panel}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend), frameon=False)
    with _replace(path) as part:
        figure.savefig(part, dpi=130, format="png", metadata={"Software": MARK})


def _panel(axes: Any, comparison: Comparison, metric: Metric) -> None:
    spread = comparison.spread(metric.name)
    ticks = np.arange(len(spread))
    axes.set_title(metric.name, fontsize=10)
    axes.set_xlabel(f"{metric.better} is better" if metric.comparable else "not comparable between types", fontsize=8)
    for tick, (encoder_type, runs) in enumerate(comparison.runs.groupby("encoder_type", sort=False)):
        colour = COLOURS[tick % len(COLOURS)]
        axes.bar(tick, spread["mean"].iloc[tick], width=0.62, color=colour, label=encoder_type)
        if len(runs) > 1:
            x = tick + np.linspace(-0.15, 0.15, len(runs))
            axes.scatter(x, runs[metric.name], s=14, color="black", zorder=3, label="one run")
    for label, column in baselines(comparison, metric):
        level, style = comparison.spread(column)["mean"], {"chance": ":", "untrained": "--"}[label]
        axes.hlines(level, ticks - 0.42, ticks + 0.42, ls=style, color="black", lw=1.3, label=label)
    means = ["none" if math.isnan(mean) else f"{mean:.4g}" for mean in spread["mean"]]
    axes.set_xticks(ticks, [f"{t}\n{mean}" for t, mean in zip(spread.index, means, strict=True)], fontsize=9)
    axes.set_xlim(-0.6, len(spread) - 0.4)
    axes.margins(y=0.1)
    axes.tick_params(axis="y", labelsize=8)
    axes.axhline(0, color="black", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
