"""The evaluation as a page without a server, as JSON, and as a table for the terminal."""

import base64
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2

from simsiam_dali.evaluation.metrics import METRICS, Score
from simsiam_dali.evaluation.plan import GUESS, MIN_SONGS, MIN_UNSEEN, TARGETS, Evaluation, Figure, Options

PROBES = {
    "ridge": "linear (ridge)",
    "logistic": "linear (logistic)",
    "knn": "k-NN",
    "mlp": "MLP",
    "retrieval": "retrieval",
}
NAMES = {
    "mse": "MSE",
    "mae": "MAE",
    "correlation": "correlation",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "map_at_10": "mAP@10",
}
HEADLINES = (("rating", "mlp", "correlation"), ("artist", "knn", "accuracy"), ("genre", "knn", "accuracy"),
             ("artist", "retrieval", "map_at_10"))  # fmt: skip
"""What stands on top of the page, split by album."""


def number(value: float) -> str:
    """Three decimals, or a dash for what is undefined."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def interval(score: Score) -> str:
    """The 95% interval in brackets."""
    return f"[{number(score.low)}, {number(score.high)}]"


def mood(figure: Figure) -> str:
    """The verdict's colour."""
    kinds = {"better": "good", "worse": "bad"}
    return kinds.get(figure.verdict.split()[0], "open")


def classifier_metrics(evaluation: Evaluation) -> dict[str, float]:
    """The plan's `classifier/val_*`: the MLP's predictions of songs whose album it has not heard."""
    wanted = ("rating", "mlp", "album", "all")
    chosen = [f for f in evaluation.figures if (f.target, f.probe, f.split, f.songs) == wanted]
    return {f"classifier/val_{f.metric}": f.score.value for f in chosen}


def as_json(evaluation: Evaluation, provenance: Mapping[str, Any], options: Options) -> str:
    """metrics.json: every figure with its interval and floors; what is undefined is null."""

    def plain(score: Score) -> dict[str, float | None]:
        values = {"value": score.value, "low": score.low, "high": score.high}
        return {name: None if math.isnan(value) else round(value, 6) for name, value in values.items()}

    figures = [
        {
            "name": f.name, "target": f.target, "probe": f.probe, "metric": f.metric, "split": f.split,
            "songs": f.songs, "n": f.n, **plain(f.score), "higher_is_better": METRICS[f.metric].sign > 0,
            "floors": {name: plain(floor) for name, floor in f.floors.items()}, "verdict": f.verdict,
        }
        for f in evaluation.figures
    ]  # fmt: skip
    classifier = {name: None if math.isnan(v) else v for name, v in classifier_metrics(evaluation).items()}
    everything = {"classifier": classifier, "figures": figures, "statements": evaluation.statements}
    everything |= {"options": vars(options), "provenance": provenance}
    return json.dumps(everything, indent=1, ensure_ascii=False) + "\n"


def best_floor(figure: Figure) -> tuple[str, Score] | None:
    """The floor that is hardest to beat."""
    known = [(name, floor) for name, floor in figure.floors.items() if floor.known]
    return max(known, key=lambda item: METRICS[figure.metric].sign * item[1].value, default=None)


def terminal_table(evaluation: Evaluation) -> Iterator[str]:
    """One line a figure on all songs, and what could not be evaluated."""
    head = ("target", "split by", "probe", "metric", "songs", "value", "95% interval", "best floor", "verdict")
    rows = [head]
    for f in evaluation.figures:
        if f.songs == "all":
            floor = best_floor(f)
            beside = f"{number(floor[1].value)} {floor[0]}" if floor else "–"
            row = (f.target, f.split, PROBES[f.probe], NAMES[f.metric], str(f.n), number(f.score.value))
            rows.append((*row, interval(f.score), beside, f.verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    if len(rows) > 1:
        yield from ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    for target, statements in evaluation.statements.items():
        for statement in statements:
            yield f"{target}: {statement}"


def environment() -> jinja2.Environment:
    """The templates of this package; every text is escaped."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("simsiam_dali.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    made.filters |= {"number": number, "interval": interval, "mood": mood}
    return made


def map_page(data: Mapping[str, Any]) -> str:
    """The interactive map, of what `maps.page_data` returns."""
    return environment().get_template("map.html.j2").render(data=data, songs=len(data["title"]))


def page(
    evaluation: Evaluation,
    provenance: Mapping[str, Any],
    options: Options,
    pictures: Mapping[str, bytes],
    map_html: str | None,
) -> str:
    """report.html, which needs no other file. pictures: title to PNG."""
    by_target = {target: [f for f in evaluation.figures if f.target == target] for target in TARGETS}
    wanted = [(*headline, "album", "all") for headline in HEADLINES]
    found = {(f.target, f.probe, f.metric, f.split, f.songs): f for f in evaluation.figures}
    floors = list(dict.fromkeys(name for f in evaluation.figures for name in f.floors))
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            evaluation=evaluation,
            by_target=by_target,
            headlines=[found[key] for key in wanted if key in found],
            floors=floors,
            only_guess=floors == [GUESS],
            provenance=provenance,
            options=options,
            probes=PROBES,
            names=NAMES,
            lower=[name for name, metric in METRICS.items() if metric.sign < 0],
            min_songs=MIN_SONGS,
            min_unseen=MIN_UNSEEN,
            pictures={title: base64.b64encode(png).decode() for title, png in pictures.items()},
            map_html=map_html,
        )
    )
