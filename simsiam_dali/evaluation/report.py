"""The evaluation as one HTML page, as JSON, and as a table for the terminal."""

import base64
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2

from simsiam_dali.common.table import table_lines
from simsiam_dali.evaluation.metrics import METRICS, MIN_GROUPS, Score
from simsiam_dali.evaluation.plan import GUESS, MIN_SONGS, MIN_UNSEEN, RETRIEVED, Evaluation, Figure, Options

NAMES = {
    "ridge": "linear (ridge)",
    "logistic": "linear (logistic)",
    "knn": "k-NN",
    "mlp": "MLP",
    "retrieval": "retrieval",
    "mse": "MSE",
    "mae": "MAE",
    "correlation": "correlation",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "map_at_10": "mAP@10",
}
HEADLINES = (("artist", "knn", "accuracy"), ("genre", "knn", "accuracy"), ("artist", "retrieval", "map_at_10"))
"""(target, probe, metric) of the `comparable_figures` at the top of the page, after those that `compare` shows."""


def number(value: float) -> str:
    """Three decimals, or a dash for what is undefined."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def interval(score: Score) -> str:
    """The 95% interval in brackets."""
    return f"[{number(score.low)}, {number(score.high)}]"


def comparable_figures(evaluation: Evaluation) -> list[Figure]:
    """The figures split by album, each over the songs by which encoders of all types compare.

    They are songs that the encoder was not trained on, whatever its type, so that runs are compared on the same songs,
    and one that knows its training songs by heart does not win. Where there are too few of them, they are all songs, or
    there is no figure if the encoder learned from tags or ratings.
    """
    by_album = [f for f in evaluation.figures if f.split == "album"]
    held_back = {(f.target, f.probe) for f in by_album if f.songs == "unseen"}
    return [f for f in by_album if f.songs == ("unseen" if (f.target, f.probe) in held_back else evaluation.judged_by)]


def compared_figures(evaluation: Evaluation) -> list[Figure]:
    """Of the MLP's predicted ratings: by these `compare` compares runs."""
    return [f for f in comparable_figures(evaluation) if (f.target, f.probe) == ("rating", "mlp")]


def classifier_metrics(evaluation: Evaluation) -> dict[str, float]:
    """The values of `compared_figures` by their names in MLflow, with those of the guess and of the untrained encoder.

    `_songs` is the number of songs.
    """
    found: dict[str, float] = {}
    for f in compared_figures(evaluation):
        name = f"classifier/val_{f.metric}"
        found |= {name: f.score.value, f"{name}_songs": float(f.n)}
        for label, baseline in (("chance", GUESS), ("untrained", "untrained")):
            if baseline in f.baselines:
                found[f"{name}_{label}"] = f.baselines[baseline].value
    return found


def as_json(evaluation: Evaluation, provenance: Mapping[str, Any], options: Options) -> str:
    """metrics.json: every figure with its interval and its baselines; what is undefined is null."""

    def plain(score: Score) -> dict[str, float | None]:
        values = {name: getattr(score, name) for name in ("value", "low", "high")}
        return {name: None if math.isnan(value) else round(value, 6) for name, value in values.items()}

    figures = [
        {
            "name": f.name, "target": f.target, "probe": f.probe, "metric": f.metric, "split": f.split,
            "songs": f.songs, "n": f.n, **plain(f.score), "higher_is_better": METRICS[f.metric].sign > 0,
            "baselines": {name: plain(baseline) for name, baseline in f.baselines.items()}, "verdict": f.verdict,
        }
        for f in evaluation.figures
    ]  # fmt: skip
    classifier = {name: None if math.isnan(v) else v for name, v in classifier_metrics(evaluation).items()}
    everything = {"classifier": classifier, "figures": figures, "statements": evaluation.notes}
    everything["hubness"] = {name: vars(own) for name, own in evaluation.hubness.items()}
    everything |= {"options": vars(options), "provenance": provenance}
    return json.dumps(everything, indent=1, ensure_ascii=False) + "\n"


def terminal_table(evaluation: Evaluation) -> Iterator[str]:
    """One line for each figure on all songs, those that `compare` shows, and what could not be evaluated."""
    values = ("songs", "value", "95% interval", "best baseline", "verdict")
    figures = [f for f in evaluation.figures if f.songs == "all"]
    if figures:
        head = ("target", "split by", "probe", "metric", *values)
        yield from table_lines(
            head, [(f.target, f.split, NAMES[f.probe], NAMES[f.metric], *_cells(f)) for f in figures]
        )
    if compared := compared_figures(evaluation):
        of = "held back from the training" if compared[0].songs == "unseen" else "of the table"
        yield ""
        yield f"what compare compares: ratings predicted by the MLP, split by album, of rated songs {of}"
        yield from table_lines(("name", *values), [(f"classifier/val_{f.metric}", *_cells(f)) for f in compared])
        yield ""
    for target, notes in evaluation.notes.items():
        for note in notes:
            yield f"{target}: {note}"
    if evaluation.hubness:
        ours, *others = (f"{own.never:.0%} ({name})" for name, own in evaluation.hubness.items())
        yield f"songs that are never among another song's {RETRIEVED} nearest: {', '.join([ours, *others])}"


def _cells(figure: Figure) -> tuple[str, ...]:
    """Number of songs, value, interval, best baseline and verdict."""
    values = {name: baseline.value for name, baseline in figure.baselines.items() if not math.isnan(baseline.value)}
    best = max(values, key=lambda name: METRICS[figure.metric].sign * values[name], default=None)
    baseline = f"{number(values[best])} {best}" if best else "–"
    return str(figure.n), number(figure.score.value), interval(figure.score), baseline, figure.verdict


TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("simsiam_dali.evaluation"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)
TEMPLATES.filters |= {"number": number, "interval": interval}


def map_page(data: Mapping[str, Any]) -> str:
    """map.html, from the result of `maps.page_data`."""
    return TEMPLATES.get_template("map.html.j2").render(data=data, songs=len(data["title"]))


def page(
    done: Evaluation, provenance: dict[str, Any], options: Options, pictures: dict[str, bytes], map_html: str | None
) -> str:
    """report.html, which needs no other file. pictures: title to PNG."""
    found = {(f.target, f.probe, f.metric): f for f in comparable_figures(done)}
    baselines = list(dict.fromkeys(name for f in done.figures for name in f.baselines))
    return TEMPLATES.get_template("report.html.j2").render(
        evaluation=done,
        headlines=[found[key] for key in HEADLINES if key in found],
        compared=compared_figures(done),
        baselines=baselines,
        only_guess=baselines == [GUESS],
        provenance=provenance,
        options=options,
        names=NAMES,
        metrics=METRICS,
        min_songs=MIN_SONGS,
        min_groups=MIN_GROUPS,
        min_unseen=MIN_UNSEEN,
        retrieved=RETRIEVED,
        pictures={title: base64.b64encode(png).decode() for title, png in pictures.items()},
        map_html=map_html,
    )
