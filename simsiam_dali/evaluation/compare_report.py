"""A comparison as lines for the terminal, as CSV and as a plot."""

import csv
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import atomic_write, refuse_failed_write
from simsiam_dali.common.table import table_lines
from simsiam_dali.evaluation.compare_runs import AB_TYPES, BY_NAME, METRICS, Comparison, Metric, Run, Spread

MARK = "simsiam_dali.compare"
"""Software tag in the plot's metadata, by which a later comparison may replace the file."""

ADVICE = "choose another file with --csv or --png"

RUN_COLUMNS = ("encoder_type", "run_name", "run_id", "started", "shards", "seed")

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
PANELS_PER_ROW = 4


def cell(s: Spread, runs: int) -> str:
    """A value, or a mean with its range; and the number of runs that have it where not all of `runs` do."""
    if s.n == 0:
        return "-"
    incomplete = f", n={s.n}" if s.n < runs else ""
    if s.low == s.high:
        return f"{s.mean:.4g}{incomplete}"
    return f"{s.mean:.4g} ({s.low:.4g} to {s.high:.4g}{incomplete})"


def logged_metrics(comparison: Comparison) -> list[Metric]:
    """The metrics that any selected run has."""
    return [m for m in METRICS if any(m.name in run.values for run in comparison.runs)]


def table(comparison: Comparison) -> list[str]:
    """One column per type, one row per metric, and the baselines below each kNN score."""
    types = list(comparison.types)
    counts = [len(runs) for runs in comparison.types.values()]
    rows = [["runs", *(f"{n} of {comparison.candidates[t]}" for t, n in zip(types, counts, strict=True)), "", ""]]
    for metric in logged_metrics(comparison):
        spreads = [comparison.spread(t, metric.name) for t in types]
        better = metric.better if metric.comparable else "not comparable between types"
        rows.append([metric.name, *map(cell, spreads, counts), better, ahead(comparison, metric)])
        for label, baseline in baselines(comparison, metric):
            rows.append([f"  {label}", *map(cell, baseline, counts), "", ""])
    return table_lines(["", *types, "better", "ahead"], rows)


def baselines(comparison: Comparison, metric: Metric) -> Iterator[tuple[str, list[Spread]]]:
    """(label, spread of each type) of the baselines of a kNN score: chance, and the untrained encoder."""
    chance = [comparison.spread(t, f"{metric.name}_chance") for t in comparison.types]
    untrained = [comparison.untrained(t, metric.name) for t in comparison.types]
    for label, baseline in (("chance", chance), ("untrained", untrained)):
        if any(s.n for s in baseline):
            yield label, baseline


def ahead(comparison: Comparison, metric: Metric) -> str:
    """The type with the better mean, and whether the ranges of several runs overlap."""
    found = comparison.ahead(metric)
    if found is None:
        return ""
    encoder_type, disjoint = found
    if disjoint is None:
        return encoder_type
    return f"{encoder_type}, ranges {'disjoint' if disjoint else 'overlap'}"


def notes(comparison: Comparison) -> Iterator[str]:
    """How the runs were selected, what is missing, and how far a difference can be trusted."""
    yield from comparison.notes
    yield from missing_metrics(comparison)
    yield from significance_notes(comparison)
    if len(comparison.types) == 1:
        (only,) = comparison.types
        other = next(t for t in AB_TYPES if t != only)
        yield f"no {other} run to compare with {only}: python -m simsiam_dali.train --encoder-type {other}"


def missing_metrics(comparison: Comparison) -> Iterator[str]:
    """Each metric that a selected run lacks, with the command that logs it; and values that are not finite."""
    for logged_by in dict.fromkeys(m.logged_by for m in METRICS):
        lacking: dict[str, list[str]] = {}
        for run in comparison.runs:
            if names := ", ".join(m.name for m in METRICS if m.logged_by == logged_by and m.name not in run.values):
                lacking.setdefault(names, []).append(run.name)
        for names, runs in lacking.items():
            where = "every run" if len(runs) == len(comparison.runs) else ", ".join(runs)
            yield f"missing: {names} in {where} (logged by {logged_by})"
    for run in comparison.runs:
        if names := ", ".join(name for name in BY_NAME if math.isnan(run.values.get(name, 0.0))):
            yield f"not finite: {names} in {run.name}"


def significance_notes(comparison: Comparison) -> Iterator[str]:
    """How far a difference can be trusted."""
    if len(comparison.types) < 2:
        return
    counts = {t: len(runs) for t, runs in comparison.types.items()}
    if min(counts.values()) == 1:
        single = "one run each" if max(counts.values()) == 1 else f"one run of {min(counts, key=lambda t: counts[t])}"
        yield f"{single}: the difference may be chance; train with --seed 1, 2, ..., then compare --runs 0"
    selected = any(n < comparison.candidates[t] for t, n in counts.items())
    if selected and len(set(comparison.candidates.values())) > 1:
        yield "the best of more runs is better by chance alone: --runs 0 compares all runs of each type"
    if comparison.by and len(counts) == 2 and not selected:
        m, n = (comparison.spread(t, comparison.by.name).n for t in comparison.types)
        found = comparison.ahead(comparison.by)
        if found and found[1]:
            # Under the null hypothesis all splits of m + n values into m and n are equally likely; two are disjoint.
            p = 2 / math.comb(m + n, m)
            yield (
                f"{comparison.by.name}: the ranges of {m} and {n} runs are disjoint, which has probability {p:.1%} for"
                " two equal types"
            )
        elif found and found[1] is False:
            yield f"{comparison.by.name}: the ranges overlap, so these runs do not show which type is better"


def mlflow_filters(comparison: Comparison) -> list[str]:
    """Search strings for the MLflow UI: the selected runs, then all runs of each type (its syntax has no OR)."""
    ids = ", ".join(f"'{run.id}'" for run in comparison.runs)
    return [f"attributes.run_id IN ({ids})", *(f'tags.encoder_type = "{t}"' for t in comparison.types)]


def check_replaceable(path: Path) -> None:
    """Raise UserError when `path` exists and was not written by this command."""
    if not path.exists():
        return
    with refuse_failed_write(path, ADVICE), path.open("rb") as file:
        head = file.read(1024)
    if head and not head.startswith(",".join(RUN_COLUMNS).encode()) and MARK.encode() not in head:
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
    knn = [m.name for m in METRICS if m.name.startswith("knn/")]
    columns = [m.name for m in METRICS] + [f"{name}_chance" for name in knn]

    def row(run: Run) -> list[str]:
        identity = [run.encoder_type, run.name, run.id, run.started.isoformat(timespec="seconds"), run.shards or ""]
        values = [run.value(c) for c in columns] + [run.untrained.get(name, math.nan) for name in knn]
        return [*identity, run.seed, *("" if math.isnan(v) else repr(v) for v in values)]

    with _replace(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*RUN_COLUMNS, *columns, *(f"{name}_untrained" for name in knn)])
        writer.writerows(map(row, comparison.runs))


def write_png(comparison: Comparison, path: Path) -> None:
    """One panel per metric: a bar per type (its mean), a point per run, baselines as lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = logged_metrics(comparison)
    columns = min(PANELS_PER_ROW, len(metrics))
    lines = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(3.1 * columns, 2.7 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, metric in zip(panels, metrics, strict=False):
        _panel(axes, comparison, metric)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    with _replace(path) as part:
        figure.savefig(part, dpi=130, format="png", metadata={"Software": MARK})


def _panel(axes: Any, comparison: Comparison, metric: Metric) -> None:
    better = f"{metric.better} is better" if metric.comparable else "not comparable between types"
    axes.set_title(metric.name, fontsize=10)
    axes.set_xlabel(better, fontsize=8, color="#555555")
    for at, (encoder_type, runs) in enumerate(comparison.types.items()):
        values = [run.value(metric.name) for run in runs if math.isfinite(run.value(metric.name))]
        if not values:
            axes.text(at, 0, "none", ha="center", va="bottom", fontsize=8, color="#999999")
            continue
        mean = math.fsum(values) / len(values)
        axes.bar(at, mean, width=0.62, color=COLOURS[at % len(COLOURS)], label=encoder_type)
        if len(values) > 1:
            x = [at + 0.3 * (i / (len(values) - 1) - 0.5) for i in range(len(values))]
            axes.scatter(x, values, s=14, color="black", zorder=3, label="one run")
        axes.annotate(
            f"{mean:.4g}",
            (at, max(values) if mean >= 0 else min(values)),
            xytext=(0, 4 if mean >= 0 else -4),
            textcoords="offset points",
            ha="center",
            va="bottom" if mean >= 0 else "top",
            fontsize=8,
        )
        for label, style in (("chance", ":"), ("untrained", "--")):
            if level := dict(baselines(comparison, metric)).get(label):
                axes.plot([at - 0.42, at + 0.42], [level[at].mean] * 2, ls=style, color="black", lw=1.3, label=label)
    axes.set_xticks(range(len(comparison.types)), list(comparison.types), fontsize=9)
    axes.set_xlim(-0.6, len(comparison.types) - 0.4)
    axes.margins(y=0.18)
    axes.tick_params(axis="y", labelsize=8)
    axes.axhline(0, color="black", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
