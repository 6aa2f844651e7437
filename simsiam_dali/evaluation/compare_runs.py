"""Which MLflow runs stand for each encoder type, and what they measured: the plan's sections 9.2 and 9.4.

Runs are compared only where a difference means something: finished, on one shard set, and chosen by a score that means
the same for every type. No loss does: SimSiam's is lowest at collapse, and another type's has another scale.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from simsiam_dali.common.errors import UserError

SIDES = ("simsiam", "simple")
"""The two sides of the plan's A/B test, in the order of its table's columns; other types follow."""

TRAIN = "python -m simsiam_dali.train, with validation songs that have the label"
EVALUATE = "python -m simsiam_dali.evaluate"


@dataclass(frozen=True)
class Metric:
    """A metric of the comparison: its direction, what logs it, and whether it means the same for every type."""

    name: str
    higher_is_better: bool
    made_by: str
    comparable: bool = True

    @property
    def better(self) -> str:
        """The direction in a word."""
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
"""What the best run is chosen by: the first of these that any run has."""


@dataclass(frozen=True)
class Run:
    """One MLflow run; `values` holds each metric's last value (NaN where it is not finite)."""

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
    """The chosen runs of each type, best first, out of `candidates` of them; `by` is None where no run has a score."""

    types: Mapping[str, Sequence[Run]]
    candidates: Mapping[str, int]
    by: Metric | None
    notes: Sequence[str]

    @property
    def runs(self) -> list[Run]:
        """All chosen runs."""
        return [run for runs in self.types.values() for run in runs]

    def spread(self, encoder_type: str, name: str) -> Spread:
        """Of a metric over the chosen runs of a type."""
        return spread(run.value(name) for run in self.types[encoder_type])

    def untrained(self, encoder_type: str, name: str) -> Spread:
        """Of a metric before training, over the chosen runs of a type."""
        return spread(run.untrained.get(name, math.nan) for run in self.types[encoder_type])

    def ahead(self, metric: Metric) -> tuple[str, bool | None] | None:
        """(type with the best mean, whether its whole range is clear of the others'); None where no type is ahead.

        The range of one run is a point, which says nothing about another seed: whether it is clear is None.
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


def chosen_metric(name: str) -> Metric:
    """The metric of `--by`. Raises UserError for an unknown one, and for a loss."""
    known = ", ".join(m.name for m in METRICS if m.comparable)
    if name in BY_NAME and BY_NAME[name].comparable:
        return BY_NAME[name]
    if name in BY_NAME or name.endswith("loss"):
        raise UserError(
            f"--by {name} is refused: a loss cannot tell which encoder is better (SimSiam's is lowest at collapse, and"
            f" two types' losses have different scales); choose by {known}"
        )
    raise UserError(f"--by {name} is no metric of the comparison; choose by {known}")


def choose(runs: Sequence[Run], by: str | None, number: int, include_trials: bool, shard_set: str | None) -> Comparison:
    """The best `number` runs of each type (0 = all), by the metric `by` or the first of `DEFAULT_BY` that any run has.

    `runs` newest first, which is also the order of runs without that metric. `shard_set` is the beginning of a
    fingerprint; None takes that of the newest run. Raises UserError where no run is left.
    """
    metric = chosen_metric(by) if by else None
    reasons = Counter(reason for r in runs if (reason := _unfit(r, include_trials)))
    notes = [f"left out: {_runs(n)} {reason}" for reason, n in reasons.items()]
    runs = [r for r in runs if not _unfit(r, include_trials)]
    if not runs:
        raise UserError(
            f"no finished run tagged encoder_type{'; ' if notes else ''}{'; '.join(notes)}: train first,"
            f" python -m simsiam_dali.train --encoder-type {SIDES[0]}"
        )
    runs = _same_shards(runs, shard_set, notes)

    if metric is None:
        metric = next((BY_NAME[n] for n in DEFAULT_BY if any(math.isfinite(r.value(n)) for r in runs)), None)
        notes.append(_why(metric))
    elif not any(math.isfinite(r.value(metric.name)) for r in runs):
        raise UserError(f"no run has {metric.name} yet (made by {metric.made_by}): leave --by out, or choose another")

    types: dict[str, list[Run]] = {}
    found = Counter(r.encoder_type for r in runs)
    for encoder_type in sorted(found, key=lambda t: (SIDES.index(t) if t in SIDES else len(SIDES), t)):
        best = sorted((r for r in runs if r.encoder_type == encoder_type), key=lambda r: _rank(r, metric))
        types[encoder_type] = best[: number or None]
        if metric and not math.isfinite(best[0].value(metric.name)):
            notes.append(f"no {encoder_type} run has {metric.name}: its newest are shown")
    return Comparison(types, found, metric, notes)


def _unfit(run: Run, include_trials: bool) -> str:
    """Why a run is left out; empty when it is not."""
    if run.trial and not include_trials:
        return "nested, such as HPO's trials (--include-trials takes them)"
    if run.status != "FINISHED":
        return "not finished"
    return "" if run.values.keys() & BY_NAME.keys() else "without a metric of this table"


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"


def _why(metric: Metric | None) -> str:
    if metric is None:
        return f"newest runs: none has {' or '.join(DEFAULT_BY)} to tell the best by"
    because = "" if metric.name == DEFAULT_BY[0] else f", since no run has {DEFAULT_BY[0]} yet"
    return f"best by {metric.name}, {metric.better} is better{because}"


def _rank(run: Run, metric: Metric | None) -> tuple[bool, float]:
    value = run.value(metric.name) if metric else math.nan
    if math.isnan(value):
        return True, 0.0
    return False, -value if metric and metric.higher_is_better else value


def _same_shards(runs: Sequence[Run], shard_set: str | None, notes: list[str]) -> list[Run]:
    """The runs on one shard set, and those that do not say theirs; notes say which were left out."""
    known = list(dict.fromkeys(r.shards for r in runs if r.shards))  # newest first
    if shard_set is not None:
        known.sort(key=lambda name: not name.startswith(shard_set))
        if not known or not known[0].startswith(shard_set):
            raise UserError(f"no run is on shards {shard_set}; known here: {', '.join(map(short, known)) or 'none'}")
    if unsaid := sum(r.shards is None for r in runs):
        notes.append(f"{_runs(unsaid)} without the tag shards: whether on the same songs is not known")
    for other in known[1:]:
        types = Counter(r.encoder_type for r in runs if r.shards == other)
        counts = ", ".join(f"{n} {t}" for t, n in sorted(types.items()))
        notes.append(
            f"left out: runs on other shards than {short(known[0])}: {counts} (--shard-set {short(other)} takes them)"
        )
    return [r for r in runs if r.shards is None or r.shards == known[0]]


def short(fingerprint: str) -> str:
    """The beginning of a shard set's fingerprint, enough to tell it from others."""
    return fingerprint[:12]
