"""Select the MLflow runs that represent each encoder type in a comparison.

Only runs whose difference means something are compared: finished, on one shard set, selected by a score that means the
same for every type. A loss does not: SimSiam's is lowest at collapse, and another type's has another scale.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Any

from simsiam_dali.common.errors import UserError

if TYPE_CHECKING:  # both take longer to import than the command's help takes
    import pandas as pd
    from mlflow.entities import Run

AB_TYPES = ("simsiam", "simple")
"""The two types of the A/B test, the first columns of the table; other types follow."""

COMPARED_SETTINGS = (
    "encoder.",
    "data.view",
    "data.short_view",
    "data.sample_rate",
    "train.micro_batch",
    "train.sync_bn",
)
"""Beginnings of the settings that make two runs of a type different encoders."""
NAMED = 5
BEST_OF_TAG = "hpo.best_of"
"""MLflow tag of the training that `hpo` starts with the best settings of a study."""

LARGEST = 1e300
"""MLflow's databases store infinity as the largest float."""

TRAIN = "python -m simsiam_dali.train, with validation songs that have the label"
EVALUATE = (
    "python -m simsiam_dali.evaluate, with rated songs; of an encoder that learned from tags, with 20 rated songs held"
    " back from its training: raise pack's --val-fraction"
)


@dataclass(frozen=True)
class Metric:
    """A metric of the comparison. better: `higher` or `lower`; comparable: whether two types' values compare."""

    name: str
    better: str
    logged_by: str
    comparable: bool = True


METRICS = (
    Metric("classifier/val_mse", "lower", EVALUATE),
    Metric("classifier/val_mae", "lower", EVALUATE),
    Metric("classifier/val_correlation", "higher", EVALUATE),
    Metric("knn/artist", "higher", TRAIN),
    Metric("knn/genre", "higher", TRAIN),
    Metric("knn/rating_mae", "lower", TRAIN),
    Metric("training_time_hours", "lower", "python -m simsiam_dali.train"),
    Metric("throughput/samples_per_s", "higher", "python -m simsiam_dali.train"),
    Metric("encoder/train_loss", "lower", "python -m simsiam_dali.train", comparable=False),
    Metric("encoder/val_loss", "lower", "python -m simsiam_dali.train, with validation songs", comparable=False),
)
BY_NAME = {metric.name: metric for metric in METRICS}
KNN = [name for name in BY_NAME if name.startswith("knn/")]
CLASSIFIER = [name for name in BY_NAME if name.startswith("classifier/")]
BASELINES = ("chance", "untrained")
VALUES = [
    *BY_NAME,
    *(f"{name}_{logged}" for name in KNN for logged in ("chance", "songs")),
    *(f"{name}_{logged}" for name in CLASSIFIER for logged in (*BASELINES, "songs")),
]
DEFAULT_BY = ("classifier/val_mse", "knn/artist")
"""The best run is selected by the first of these that any run has."""


@dataclass(frozen=True)
class Comparison:
    """The selected runs, those of a type together, best first, of `candidates` runs of each type.

    runs: a row each, with the columns of `_row`; NaN for a value that is missing or not finite. by: the metric that
    selected them, None where no run has a score.
    """

    runs: "pd.DataFrame"
    candidates: Mapping[str, int]
    by: Metric | None
    notes: Sequence[str]

    def spread(self, column: str) -> "pd.DataFrame":
        """A row for each type: `count` of its runs, `size`, have a value, with this `mean`, `min` and `max`."""
        return self.runs.groupby("encoder_type", sort=False)[column].agg(["size", "count", "mean", "min", "max"])

    def ahead(self, metric: Metric) -> tuple[str, str]:
        """The type with the best mean, and whether its range and the others' are `disjoint` or `overlap`.

        Both are empty where no type is ahead; the second where a type has one run, whose range is a point and tells
        nothing about another seed.
        """
        lower = metric.better == "lower"
        found = self.spread(metric.name).dropna().sort_values("mean", ascending=lower)
        if not metric.comparable or len(found) < 2 or found["mean"].iloc[0] == found["mean"].iloc[1]:
            return "", ""
        if found["count"].min() == 1:
            return found.index[0], ""
        best, others = found.iloc[0], found.iloc[1:]
        disjoint = best["max"] < others["min"].min() if lower else best["min"] > others["max"].max()
        return found.index[0], "disjoint" if disjoint else "overlap"


def selection_metric(name: str) -> Metric:
    """The metric of `--by`. Raises UserError for an unknown one, and for a loss."""
    comparable = {m.name: m for m in METRICS if m.comparable}
    if name not in comparable:
        raise UserError(
            f"--by {name} is refused; use one of {', '.join(comparable)} (a loss cannot show which encoder is better:"
            " SimSiam's is lowest at collapse, and two types' losses have different scales)"
        )
    return comparable[name]


def select(
    runs: "Iterable[Run]",
    metric: Metric | None,
    number: int,
    include_trials: bool,
    shard_set: str | None,
    reads: Callable[[str, str], bool],
) -> Comparison:
    """The best `number` runs of each type (0 = all), by `metric` or the first of `DEFAULT_BY` that any run has.

    `runs` are newest first, which is also the order of runs without that metric. `shard_set` is the beginning of a
    fingerprint; None is that of the newest run. reads: whether an encoder type reads a setting, by its dotted key.
    Raises UserError where no run is left.
    """
    import pandas as pd

    ours = [run for run in runs if "encoder_type" in run.data.tags or run.data.metrics.keys() & BY_NAME.keys()]
    reasons = [(run, _excluded_because(run, include_trials)) for run in ours]
    excluded = Counter(reason for _, reason in reasons if reason)
    notes = [f"excluded: {_runs(n)} {reason}" for reason, n in excluded.items()]
    used = {run.info.run_id: run for run, reason in reasons if not reason}
    rows = [_row(run) for run in used.values()]
    if not rows:
        raise UserError(
            f"no finished run tagged encoder_type{'; ' if notes else ''}{'; '.join(notes)}: train first,"
            f" python -m simsiam_dali.train --encoder-type {AB_TYPES[0]}"
        )
    table = _same_shards(pd.DataFrame(rows), shard_set, notes)

    finite = table.replace(math.inf, math.nan)
    if metric is None:
        metric = next((BY_NAME[name] for name in DEFAULT_BY if finite[name].notna().any()), None)
        if metric is None:
            notes.append(f"newest runs: none has {' or '.join(DEFAULT_BY)} to select the best by")
        else:
            because = "" if metric.name == DEFAULT_BY[0] else f", since no run has {DEFAULT_BY[0]} yet"
            notes.append(f"best by {metric.name}, {metric.better} is better{because}")
    elif finite[metric.name].isna().all():
        raise UserError(
            f"no run has {metric.name} yet (logged by {metric.logged_by}): omit --by, or choose another metric"
        )
    if metric:
        finite = finite.sort_values(metric.name, ascending=metric.better == "lower", kind="stable")

    found = Counter(finite["encoder_type"])
    types = [t for t in (*AB_TYPES, *sorted(found.keys() - AB_TYPES)) if t in found]
    best = []
    for t in types:
        own = finite[finite["encoder_type"] == t]
        best.append(own.iloc[: number or None])
        if metric and (scored := int(own[metric.name].notna().sum())) < len(own):
            shown = "its newest are shown" if not scored else "the others cannot be the best"
            notes.append(f"{t}: {scored} of {_runs(len(own))} with {metric.name}; {shown}")
    selected = pd.concat(best)
    notes += _settings_notes(selected, used, reads)
    notes += _missing_notes(table.loc[selected.index])
    return Comparison(selected, {t: found[t] for t in types}, metric, notes)


def add_untrained(comparison: Comparison, metric_history: Callable[[str, str], Sequence[tuple[int, float]]]) -> None:
    """Add the columns `knn/*_untrained`: each selected run's score before training, which training logs at step 0.

    metric_history: (run id, metric) to (step, value) of every value that was logged.
    """
    for name in KNN:
        untrained = []
        for run_id in comparison.runs["run_id"]:
            history = metric_history(run_id, name)
            before = [value for step, value in history if step == 0 and abs(value) < LARGEST]
            untrained.append(before[0] if 0 < len(before) < len(history) else math.nan)
        comparison.runs[f"{name}_untrained"] = untrained


def _row(run: "Run") -> dict[str, Any]:
    """What is compared of a run: who it is, and each metric's last value; NaN for none, infinity if not finite."""
    metrics = run.data.metrics
    return {
        "encoder_type": run.data.tags["encoder_type"],
        "run_name": run.info.run_name or run.info.run_id,
        "run_id": run.info.run_id,
        "started": datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
        "shards": run.data.tags.get("shards", ""),
        "seed": run.data.params.get("train.seed", ""),
        **dict.fromkeys(VALUES, math.nan),
        **{name: value if abs(value) < LARGEST else math.inf for name, value in metrics.items() if name in VALUES},
    }


def _excluded_because(run: "Run", include_trials: bool) -> str:
    """Why a run is not compared; empty when it is."""
    if "encoder_type" not in run.data.tags:
        return "without the tag encoder_type (mlflow.auto_tags)"
    if "mlflow.parentRunId" in run.data.tags and not include_trials:
        return "nested in another, such as hpo's trials (include them with --include-trials)"
    if run.info.status != "FINISHED":
        return "not finished"
    return "" if run.data.metrics.keys() & BY_NAME.keys() else "without any metric of this table"


def _same_shards(runs: "pd.DataFrame", shard_set: str | None, notes: list[str]) -> "pd.DataFrame":
    """The runs on one shard set, and those without the tag `shards`; `notes` gets a line for each other set."""
    known = list(dict.fromkeys(filter(None, runs["shards"])))  # newest first
    wanted = next((shards for shards in known if shards.startswith(shard_set or "")), "")
    if shard_set and not wanted:
        there_are = ", ".join(shards[:12] for shards in known) or "none"
        raise UserError(f"no run is on shards {shard_set}; there are runs on {there_are}")
    if untagged := int((runs["shards"] == "").sum()):
        notes.append(f"{untagged} run{'' if untagged == 1 else 's'} without the tag shards: possibly on other songs")
    for other in known:
        if other != wanted:
            types = Counter(runs["encoder_type"][runs["shards"] == other])
            counts = ", ".join(f"{n} {t}" for t, n in sorted(types.items()))
            there = f"(compare them with --shard-set {other[:12]})"
            notes.append(f"excluded: runs on other shards than {wanted[:12]}: {counts} {there}")
    return runs[runs["shards"].isin(["", wanted])]


def _settings_notes(
    selected: "pd.DataFrame", runs: "Mapping[str, Run]", reads: Callable[[str, str], bool]
) -> Iterator[str]:
    """What else than the seed, of what their type reads, differs between its runs, and which of them `hpo` chose."""
    for t, ids in selected.groupby("encoder_type", sort=False)["run_id"]:
        settings = [
            {key: value for key, value in runs[run_id].data.params.items() if key.startswith(COMPARED_SETTINGS)}
            for run_id in ids
        ]
        differ = sorted(key for key in {*chain(*settings)} if len({own.get(key) for own in settings}) > 1)
        differ = [key for key in differ if reads(str(t), key)]
        if differ:
            named = ", ".join(differ[:NAMED]) + (f" and {len(differ) - NAMED} more" if len(differ) > NAMED else "")
            yield f"the {len(ids)} runs of type {t} differ in {named}: their range is not that of seeds alone"
    named_runs = zip(selected["run_name"], selected["run_id"], strict=True)
    chosen = [name for name, run_id in named_runs if BEST_OF_TAG in runs[run_id].data.tags]
    if chosen:
        yield f"settings chosen by hpo on these validation songs, which favours {', '.join(chosen)}"


def _runs(n: int) -> str:
    return f"{n} run{'' if n == 1 else 's'}"


def _missing_notes(runs: "pd.DataFrame") -> Iterator[str]:
    """Each metric that a selected run lacks, with the command that logs it; and values that are not finite."""
    for logged_by in dict.fromkeys(m.logged_by for m in METRICS):
        names = [m.name for m in METRICS if m.logged_by == logged_by]
        lacking = _names_where(runs[names].isna())
        for missing in lacking[lacking != ""].unique():
            without = runs["run_name"][lacking == missing]
            where = "every run" if len(without) == len(runs) else ", ".join(without)
            yield f"missing: {missing} in {where} (logged by {logged_by})"
    for name, infinite in zip(runs["run_name"], _names_where(runs[list(BY_NAME)] == math.inf), strict=True):
        if infinite:
            yield f"not finite: {infinite} in {name}"


def _names_where(flags: "pd.DataFrame") -> "pd.Series[str]":
    """For each row, the names of its columns that are true."""
    return flags.apply(lambda row: ", ".join(row.index[row]), axis=1)
