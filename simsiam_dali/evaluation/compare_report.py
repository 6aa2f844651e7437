"""A comparison as lines for the terminal, as a CSV and as a picture."""

import csv
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simsiam_dali.common.errors import UserError
from simsiam_dali.evaluation.compare_runs import BY_NAME, METRICS, Comparison, Metric, Run, Spread

MARK = "simsiam_dali.compare"
"""What the picture's metadata names as its maker, so that it may be replaced."""

RUN_COLUMNS = ("encoder_type", "run_name", "run_id", "started", "shards", "seed")

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
PANELS_A_ROW = 4


def number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}"


def cell(s: Spread, runs: int) -> str:
    """One value, or a mean with its range; how many have it, where not all `runs` do."""
    if s.n == 0:
        return "-"
    lacking = f", n={s.n}" if s.n < runs else ""
    if s.low == s.high:
        return number(s.mean) + lacking
    return f"{number(s.mean)} ({number(s.low)} to {number(s.high)}{lacking})"


def measured(comparison: Comparison) -> list[Metric]:
    """The metrics that any chosen run has."""
    return [m for m in METRICS if any(m.name in run.values for run in comparison.runs)]


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of equal length as lines with aligned columns; a rule below the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for at, row in enumerate(rows):
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        if at == 0:
            yield "  ".join("-" * width for width in widths)


def table(comparison: Comparison) -> Iterator[str]:
    """One column a type, one row a metric, and below a kNN score what it has to beat."""
    types = list(comparison.types)
    chosen = [len(runs) for runs in comparison.types.values()]
    rows = [["", *types, "better", "ahead"]]
    rows.append(["runs", *(f"{n} of {comparison.candidates[t]}" for t, n in zip(types, chosen, strict=True)), "", ""])
    for metric in measured(comparison):
        spreads = [comparison.spread(t, metric.name) for t in types]
        better = metric.better if metric.comparable else "not comparable between types"
        rows.append([metric.name, *map(cell, spreads, chosen), better, ahead(comparison, metric)])
        for label, floor in floors(comparison, metric):
            rows.append([f"  {label}", *map(cell, floor, chosen), "", ""])
    return aligned(rows)


def floors(comparison: Comparison, metric: Metric) -> Iterator[tuple[str, list[Spread]]]:
    """What a kNN score of each type has to beat: a guess that hears nothing, and the untrained encoder."""
    guess = [comparison.spread(t, f"{metric.name}_chance") for t in comparison.types]
    untrained = [comparison.untrained(t, metric.name) for t in comparison.types]
    for label, floor in (("a guess", guess), ("untrained", untrained)):
        if any(s.n for s in floor):
            yield label, floor


def ahead(comparison: Comparison, metric: Metric) -> str:
    """Which type has the better mean, and whether the ranges of several runs overlap."""
    found = comparison.ahead(metric)
    if found is None:
        return ""
    encoder_type, clear = found
    if clear is None:
        return encoder_type
    return f"{encoder_type}, ranges {'apart' if clear else 'overlap'}"


def remarks(comparison: Comparison) -> Iterator[str]:
    """What the reader of the table has to know."""
    yield from comparison.notes
    yield from missing(comparison)
    yield from caution(comparison)


def missing(comparison: Comparison) -> Iterator[str]:
    """Each metric that a chosen run lacks, with the command that makes it; and those that are no number."""
    for made_by in dict.fromkeys(m.made_by for m in METRICS):
        lacking: dict[str, list[str]] = {}
        for run in comparison.runs:
            if names := ", ".join(m.name for m in METRICS if m.made_by == made_by and m.name not in run.values):
                lacking.setdefault(names, []).append(run.name)
        for names, runs in lacking.items():
            where = "every run" if len(runs) == len(comparison.runs) else ", ".join(runs)
            yield f"missing: {names} in {where} (made by {made_by})"
    for run in comparison.runs:
        if names := ", ".join(name for name in BY_NAME if math.isnan(run.values.get(name, 0.0))):
            yield f"not a number: {names} in {run.name}"


def caution(comparison: Comparison) -> Iterator[str]:
    """How far a difference can be trusted."""
    if len(comparison.types) < 2:
        return
    counts = {t: len(runs) for t, runs in comparison.types.items()}
    if min(counts.values()) == 1:
        single = "one run each" if max(counts.values()) == 1 else f"one run of {min(counts, key=lambda t: counts[t])}"
        yield f"{single}: a difference this size may be chance; train with --seed 1, 2, ..., then compare --runs 0"
    chosen = any(n < comparison.candidates[t] for t, n in counts.items())
    if chosen and len(set(comparison.candidates.values())) > 1:
        yield "the best of more runs is better by luck alone: --runs 0 takes all of each type"
    if comparison.by and len(counts) == 2 and not chosen:
        m, n = (comparison.spread(t, comparison.by.name).n for t in comparison.types)
        found = comparison.ahead(comparison.by)
        if found and found[1]:
            # Of all ways to deal m + n values into two hands of m and n, two leave the hands apart.
            share = 2 / math.comb(m + n, m)
            yield (
                f"{comparison.by.name}: the ranges are apart; those of {m} and {n} runs of equal types are too in"
                f" {share:.1%} of cases"
            )
        elif found and found[1] is False:
            yield f"{comparison.by.name}: the ranges overlap, so these runs do not tell which type is better"


def filters(comparison: Comparison) -> list[str]:
    """What to paste into the search box of the MLflow UI: first these very runs, then each type. It knows no OR."""
    ids = ", ".join(f"'{run.id}'" for run in comparison.runs)
    return [f"attributes.run_id IN ({ids})", *(f'tags.encoder_type = "{t}"' for t in comparison.types)]


# --- files


def check_replaceable(path: Path) -> None:
    """Raise UserError when `path` is there and is no file of this command."""
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as e:
        raise UserError(f"{path} cannot be replaced ({e.strerror}): choose another file with --csv or --png") from e
    if head and not head.startswith(",".join(RUN_COLUMNS).encode()) and MARK.encode() not in head:
        raise UserError(f"{path} exists and is no comparison: choose another file with --csv or --png")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of `path`."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}): choose another file with --csv or --png") from e


def write_csv(comparison: Comparison, path: Path) -> None:
    """One row a run: what it is, each metric, and the floors of the kNN scores; empty where there is no number."""
    knn = [m.name for m in METRICS if m.name.startswith("knn/")]
    columns = [m.name for m in METRICS] + [f"{name}_chance" for name in knn]

    def row(run: Run) -> list[str]:
        what = [run.encoder_type, run.name, run.id, run.started.isoformat(timespec="seconds"), run.shards or ""]
        values = [run.value(c) for c in columns] + [run.untrained.get(name, math.nan) for name in knn]
        return [*what, run.seed, *("" if math.isnan(v) else repr(v) for v in values)]

    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*RUN_COLUMNS, *columns, *(f"{name}_untrained" for name in knn)])
        writer.writerows(map(row, comparison.runs))


def write_png(comparison: Comparison, path: Path) -> None:
    """Small multiples: one panel a metric, one bar a type (its mean), one point a run, floors as lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = measured(comparison)
    columns = min(PANELS_A_ROW, len(metrics))
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
    with replacing(path) as part:
        figure.savefig(part, dpi=130, format="png", metadata={"Software": MARK})


def _panel(axes: Any, comparison: Comparison, metric: Metric) -> None:
    better = f"{metric.better} is better" if metric.comparable else "not comparable between types"
    axes.set_title(metric.name, fontsize=10)
    axes.set_xlabel(better, fontsize=8, color="#555555")
    for at, (encoder_type, runs) in enumerate(comparison.types.items()):
        values = finite(run.value(metric.name) for run in runs)
        if not values:
            axes.text(at, 0, "none", ha="center", va="bottom", fontsize=8, color="#999999")
            continue
        mean = math.fsum(values) / len(values)
        axes.bar(at, mean, width=0.62, color=COLOURS[at % len(COLOURS)], label=encoder_type)
        if len(values) > 1:
            places = [at + 0.3 * (i / (len(values) - 1) - 0.5) for i in range(len(values))]
            axes.scatter(places, values, s=14, color="black", zorder=3, label="a run")
        axes.annotate(
            number(mean),
            (at, max(values) if mean >= 0 else min(values)),
            xytext=(0, 4 if mean >= 0 else -4),
            textcoords="offset points",
            ha="center",
            va="bottom" if mean >= 0 else "top",
            fontsize=8,
        )
        for label, style in (("a guess", ":"), ("untrained", "--")):
            if level := dict(floors(comparison, metric)).get(label):
                axes.plot([at - 0.42, at + 0.42], [level[at].mean] * 2, ls=style, color="black", lw=1.3, label=label)
    axes.set_xticks(range(len(comparison.types)), list(comparison.types), fontsize=9)
    axes.set_xlim(-0.6, len(comparison.types) - 0.4)
    axes.margins(y=0.18)
    axes.tick_params(axis="y", labelsize=8)
    axes.axhline(0, color="black", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def finite(values: Iterable[float]) -> list[float]:
    """Those that are numbers."""
    return [v for v in values if math.isfinite(v)]
