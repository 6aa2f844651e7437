"""Select the MLflow runs that represent each encoder type in a comparison.

Only runs whose difference means something are compared: finished, on one shard set, selected by a score that means the
same for every type. A loss does not: SimSiam's is lowest at collapse, and another type's has another scale.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from simsiam_dali.common.errors import UserError

if TYPE_CHECKING:
    from mlflow import entities

AB_TYPES = ("simsiam", "simple")
"""The two types of the A/B test, the first columns of the table; other types follow."""

LARGEST = 1e300
"""MLflow's databases store infinity as the largest float."""

TRAIN = "python -m simsiam_dali.train, with validation songs that have the label"
EVALUATE = "python -m simsiam_dali.evaluate"


@dataclass(frozen=True)
class Metric:
    """A metric of the comparison: its direction, the command that logs it, whether it compares between types."""

    name: str
    higher_is_better: bool
    logged_by: str
    comparable: bool = True

    @property
    def better(self) -> str:
        """`higher` or `lower`."""
        return "higher" if self.higher_is_better else "lower"


METRICS = (
    Metric("classifier/val_mse", False, EVALUATE),
    Metric("classifier/val_mae", False, EVALUATE),
    Metric("classifier/val_correlation", True, EVALUATE),
    Metric("knn/artist", True, TRAIN),
    Metric("knn/genre", True, TRAIN),
    Metric("knn/rating_mae", False, TRAIN),
    Metric("training_time_hours", False, "python -m simsiam_dali.train"),
    Metric("throughput/samples_per_s", True, "python -m simsiam_dali.train"),
    Metric("encoder/train_loss", False, "python -m simsiam_dali.train", comparable=False),
    Metric("encoder/val_loss", False, "python -m simsiam_dali.train, with validation songs", comparable=False),
)
BY_NAME = {metric.name: metric for metric in METRICS}
DEFAULT_BY = ("classifier/val_mse", "knn/artist")
"""The best run is selected by the first of these that any run has."""


@dataclass(frozen=True)
class Run:
    """One MLflow run; `values` holds each metric's last value, NaN for infinity. trial: nested in another run."""

    id: str
    name: str
    encoder_type: str
    status: str
    started: datetime
    trial: bool
    shards: str | None
    seed: str
    values: Mapping[str, float]
    untrained: Mapping[str, float] = field(default_factory=dict)

    def value(self, name: str) -> float:
        """The last value of a metric; NaN where there is none."""
        return self.values.get(name, math.nan)


def encoder_runs(runs: "Iterable[entities.Run]") -> list[Run]:
    """The runs tagged `encoder_type`, in the same order."""
    return [
        Run(
            id=run.info.run_id,
            name=run.info.run_name or run.info.run_id,
            encoder_type=run.data.tags["encoder_type"],
            status=run.info.status,
            started=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
            trial="mlflow.parentRunId" in run.data.tags,
            shards=run.data.tags.get("shards"),
            seed=run.data.params.get("train.seed", ""),
            values={name: _finite(value) for name, value in run.data.metrics.items()},
        )
        for run in runs
        if "encoder_type" in run.data.tags
    ]


def _finite(value: float) -> float:
    return value if abs(value) < LARGEST else math.nan


@dataclass(frozen=True)
class Spread:
    """Mean and range of one metric over the `n` runs of a type that have it; NaN for none."""

    n: int
    mean: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """Of the finite ones among `values`."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return Spread(0, math.nan, math.nan, math.nan)
    return Spread(len(finite), math.fsum(finite) / len(finite), min(finite), max(finite))


@dataclass(frozen=True)
class Comparison:
    """The selected runs of each type, best first, of `candidates` runs; `by` is None where no run has a score."""

    types: Mapping[str, Sequence[Run]]
    candidates: Mapping[str, int]
    by: Metric | None
    notes: Sequence[str]

    @property
    def runs(self) -> list[Run]:
        """All selected runs."""
        return [run for runs in self.types.values() for run in runs]

    def spread(self, encoder_type: str, name: str) -> Spread:
        """Of a metric over the selected runs of a type."""
        return spread(run.value(name) for run in self.types[encoder_type])

    def untrained(self, encoder_type: str, name: str) -> Spread:
        """Of a metric before training, over the selected runs of a type."""
        return spread(run.untrained.get(name, math.nan) for run in self.types[encoder_type])

    def ahead(self, metric: Metric) -> tuple[str, bool | None] | None:
        """(type with the best mean, whether its range is disjoint from the others'); None where no type is ahead.

        The second is None where a type has one run: its range is a point, and tells nothing about another seed.
        """
        found = {t: s for t in self.types if (s := self.spread(t, metric.name)).n}
        if not metric.comparable or len(found) < 2:
            return None
        sign = 1 if metric.higher_is_better else -1
        first, *others = sorted(found, key=lambda t: sign * found[t].mean, reverse=True)
        if found[first].mean == found[others[0]].mean:
            return None
        if min(s.n for s in found.values()) == 1:
            return first, None
        worst = min(sign * found[first].low, sign * found[first].high)
        return first, all(worst > max(sign * found[t].low, sign * found[t].high) for t in others)


def selection_metric(name: str) -> Metric:
    """The metric of `--by`. Raises UserError for an unknown one, and for a loss."""
    known = ", ".join(m.name for m in METRICS if m.comparable)
    if name in BY_NAME and BY_NAME[name].comparable:
        return BY_NAME[name]
    if name in BY_NAME or name.endswith("loss"):
        raise UserError(
            f"--by {name} is refused: a loss cannot show which encoder is better (SimSiam's is lowest at collapse, and"
            f" two types' losses have different scales); use one of {known}"
        )
    raise UserError(f"--by {name} is not a metric of the comparison; use one of {known}")


def select(
    runs: Sequence[Run], metric: Metric | None, number: int, include_trials: bool, shard_set: str | None
) -> Comparison:
    """The best `number` runs of each type (0 = all), by `metric` or the first of `DEFAULT_BY` that any run has.

    `runs` are newest first, which is also the order of runs without that metric. `shard_set` is the beginning of a
    fingerprint; None is that of the newest run. Raises UserError where no run is left.
    """
    reasons = Counter(reason for r in runs if (reason := _excluded_because(r, include_trials)))
    notes = [f"excluded: {_runs(n)} {reason}" for reason, n in reasons.items()]
    runs = [r for r in runs if not _excluded_because(r, include_trials)]
    if not runs:
        raise UserError(
            f"no finished run tagged encoder_type{'; ' if notes else ''}{'; '.join(notes)}: train first,"
            f" python -m simsiam_dali.train --encoder-type {AB_TYPES[0]}"
        )
    runs = _same_shards(runs, shard_set, notes)

    if metric is None:
        metric = next((BY_NAME[n] for n in DEFAULT_BY if any(math.isfinite(r.value(n)) for r in runs)), None)
        notes.append(_selection_note(metric))
    elif not any(math.isfinite(r.value(metric.name)) for r in runs):
        raise UserError(
            f"no run has {metric.name} yet (logged by {metric.logged_by}): omit --by, or choose another metric"
        )

    types: dict[str, list[Run]] = {}
    found = Counter(r.encoder_type for r in runs)
    for encoder_type in sorted(found, key=lambda t: (AB_TYPES.index(t) if t in AB_TYPES else len(AB_TYPES), t)):
        best = sorted((r for r in runs if r.encoder_type == encoder_type), key=lambda r: _rank(r, metric))
        types[encoder_type] = best[: number or None]
        if metric and not math.isfinite(best[0].value(metric.name)):
            notes.append(f"no {encoder_type} run has {metric.name}: its newest are shown")
    return Comparison(types, found, metric, notes)


def with_untrained(
    comparison: Comparison, metric_history: Callable[[str, str], Sequence[tuple[int, float]]]
) -> Comparison:
    """The comparison with each selected run's kNN scores before training, which training logs at step 0.

    metric_history: (run id, metric) to (step, value) of every value that was logged.
    """

    def untrained(run: Run) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in (m.name for m in METRICS if m.name.startswith("knn/") and m.name in run.values):
            history = metric_history(run.id, name)
            before = [value for step, value in history if step == 0]
            if before and len(before) < len(history):
                found[name] = _finite(before[0])
        return found

    types = {t: [replace(run, untrained=untrained(run)) for run in runs] for t, runs in comparison.types.items()}
    return replace(comparison, types=types)


def _excluded_because(run: Run, include_trials: bool) -> str:
    """Why a run is not compared; empty when it is."""
    if run.trial and not include_trials:
        return "nested in another, such as HPO's trials (include them with --include-trials)"
    if run.status != "FINISHED":
        return "not finished"
    return "" if run.values.keys() & BY_NAME.keys() else "without any metric of this table"


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"


def _selection_note(metric: Metric | None) -> str:
    if metric is None:
        return f"newest runs: none has {' or '.join(DEFAULT_BY)} to select the best by"
    because = "" if metric.name == DEFAULT_BY[0] else f", since no run has {DEFAULT_BY[0]} yet"
    return f"best by {metric.name}, {metric.better} is better{because}"


def _rank(run: Run, metric: Metric | None) -> tuple[bool, float]:
    value = run.value(metric.name) if metric else math.nan
    if math.isnan(value):
        return True, 0.0
    return False, -value if metric and metric.higher_is_better else value


def _same_shards(runs: Sequence[Run], shard_set: str | None, notes: list[str]) -> list[Run]:
    """The runs on one shard set, and those without the tag `shards`; `notes` gets a line for each other set."""
    known = list(dict.fromkeys(r.shards for r in runs if r.shards))  # newest first
    if shard_set is not None:
        known.sort(key=lambda name: not name.startswith(shard_set))
        if not known or not known[0].startswith(shard_set):
            raise UserError(
                f"no run is on shards {shard_set}; there are runs on {', '.join(map(short, known)) or 'none'}"
            )
    if untagged := sum(r.shards is None for r in runs):
        notes.append(f"{_runs(untagged)} without the tag shards: possibly on other songs")
    for other in known[1:]:
        types = Counter(r.encoder_type for r in runs if r.shards == other)
        counts = ", ".join(f"{n} {t}" for t, n in sorted(types.items()))
        notes.append(
            f"excluded: runs on other shards than {short(known[0])}: {counts} (compare them with --shard-set"
            f" {short(other)})"
        )
    return [r for r in runs if r.shards is None or r.shards == known[0]]


def short(fingerprint: str) -> str:
    """The first characters of a shard set's fingerprint, for display."""
    return fingerprint[:12]
