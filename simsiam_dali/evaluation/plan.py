"""Plan and run every probe of an embedding table, beside its baselines on the same songs and the same splits."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from simsiam_dali.common.names import album_keys, artist_keys, known_keys
from simsiam_dali.evaluation import knn, probes
from simsiam_dali.evaluation.folds import SPLITS, folds, groups
from simsiam_dali.evaluation.hubness import Hubness, hubness
from simsiam_dali.evaluation.metrics import METRICS, Arrays, Score, score, verdict

TARGETS = ("rating", "artist", "album", "genre")
MIN_SONGS = 10
"""Fewest songs with a rating or a label for which a figure means anything."""
MIN_UNSEEN = 20
"""Fewest songs held back from the encoder's training that get figures of their own."""
TOO_FEW_UNSEEN = (
    "The encoder learned from its training songs' tags or ratings, and fewer than"
    f" {MIN_UNSEEN} of these songs were held back from it: these figures do not judge it."
)
NOT_LOGGED = " No classifier/* is logged: pack with a larger --val-fraction, and train again."
RETRIEVED = 10
ONE_THREAD = 20_000_000
"""Tables with fewer numbers are computed by one BLAS thread: several would wait for each other longer than work."""
GUESS = "guess"
"""The baseline without audio: the training songs' mean or median rating or commonest class, or a random order."""

_GROUP = {"song": "recording", "album": "album (or of albums that share a song)"}


@dataclass(frozen=True)
class Options:
    """k: neighbours that vote. A class needs `class_songs` songs; the `classes` largest are scored."""

    k: int = 10
    class_songs: int = 3
    classes: int = 100
    resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Figure:
    """One number of the report. songs: `all`, or `unseen`: held back from the encoder's training."""

    target: str
    probe: str
    metric: str
    split: str
    songs: str
    n: int
    score: Score
    baselines: dict[str, Score]
    verdict: str

    @property
    def name(self) -> str:
        """Its name in MLflow and in metrics.json."""
        unseen = "" if self.songs == "all" else "/unseen"
        return f"eval/{self.target}/{self.probe}_{self.metric}/{self.split}_split{unseen}"


@dataclass
class Evaluation:
    """`notes`: for each target, which songs were left out, and what could not be evaluated and why.

    `hubness`: of the embedding, and of each baseline that has vectors. `judged_by`: the songs whose figures stand for
    the encoder, `all`, or `unseen` where it learned the tags or ratings of the others.
    """

    figures: list[Figure] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    hubness: dict[str, Hubness] = field(default_factory=dict)
    judged_by: str = "all"


@dataclass(frozen=True)
class Probe:
    """A prediction from vectors, and how it is scored.

    rows `(N,)`: rows of the table whose vectors `run` takes, `(N, D)`. scored `(S,)`: rows that it returns a value of,
    `(S,)`. guess `(S,)`: the values of the baseline without audio. searches: whether it takes the unit vectors. Without
    `truth` the values are the scores. mae_guess: the guess where the metric is `mae`, of which the median is the best
    constant; a probe worse than that could be better than the mean.
    """

    target: str
    name: str
    split: str
    metrics: tuple[str, ...]
    rows: np.ndarray
    scored: np.ndarray
    run: Callable[[np.ndarray], np.ndarray]
    guess: np.ndarray
    truth: np.ndarray | None = None
    mae_guess: np.ndarray | None = None
    searches: bool = False

    def guess_of(self, metric: str) -> np.ndarray:
        """The best prediction by `metric` without any vectors."""
        return self.mae_guess if metric == "mae" and self.mae_guess is not None else self.guess

    def arrays(self, metric: str, values: np.ndarray, chosen: np.ndarray) -> Arrays:
        """The arguments of `metric`, for the `chosen` of the scored songs."""
        if self.truth is None:
            return (values[chosen],)
        if metric == "correlation":
            # The mean of the songs learned from is low where the song's own rating is high: left in, it alone would
            # correlate negatively, down to -1 for k-NN of all others. What is measured is what the probe adds to it.
            values = values - self.guess
        return self.truth[chosen], values[chosen]


def evaluate(
    table: pd.DataFrame,
    vectors: Mapping[str, np.ndarray],
    unit_vectors: Mapping[str, np.ndarray],
    options: Options,
    learns_from_tags: bool = False,
) -> Evaluation:
    """Probe the first of `vectors` (name to `(N, D)`); the others are its baselines.

    `table` has the columns of an embedding table, one row a song; row i of all vectors belongs to its row i.
    unit_vectors: the same, as nearest songs are searched by.
    learns_from_tags: whether the encoder learned from tags or ratings, so that its training songs cannot judge it.
    """
    done = Evaluation(judged_by="unseen" if learns_from_tags else "all")
    unseen = (table["split"] == "val").to_numpy()
    group = {split: groups(table, split) for split in SPLITS}
    drawn_together = {target: dependent_songs(table, target, group["album"]) for target in TARGETS}
    planned: list[Probe] = []
    for target in TARGETS:
        notes: list[str] = []
        plan = partial(_plan_rating, table) if target == "rating" else partial(_plan_labels, table, target)
        for split in SPLITS:
            if (target, split) == ("album", "album"):
                notes.append("By song only: split by album, no other song of a song's album is left to learn from.")
            else:
                planned += plan(split, group[split], options, notes)
        done.notes[target] = list(dict.fromkeys(notes))
    if len(table) > RETRIEVED:  # among fewer, everybody is everybody's neighbour
        done.hubness = {name: hubness(x, group["song"], RETRIEVED) for name, x in unit_vectors.items()}
    threads = 1 if max(x.size for x in vectors.values()) < ONE_THREAD else None
    bar = tqdm(planned, unit="probe", leave=False)
    for probe in bar:
        bar.set_description(f"{probe.target}, {probe.name}, split by {probe.split}")
        with threadpool_limits(threads):
            values = {
                name: probe.run(x[probe.rows]) for name, x in (unit_vectors if probe.searches else vectors).items()
            }
        held_back = unseen[probe.scored]
        subsets = {"all": np.ones(len(held_back), bool)}
        if held_back.sum() >= MIN_UNSEEN and (learns_from_tags or not held_back.all()):
            subsets["unseen"] = held_back
        for songs, chosen in subsets.items():
            together = drawn_together[probe.target][probe.scored[chosen]]
            for name in probe.metrics:
                metric = METRICS[name]
                scores = {
                    source: score(metric, probe.arrays(name, own, chosen), together, options.resamples, options.seed)
                    for source, own in (values | {GUESS: probe.guess_of(name)}).items()
                }
                if name == "correlation":  # of a constant
                    scores[GUESS] = Score(0.0, 0.0, 0.0, np.zeros(options.resamples))
                ours = scores.pop(next(iter(vectors)))
                result = int(chosen.sum()), ours, scores, verdict(metric, ours, scores)
                done.figures.append(Figure(probe.target, probe.name, name, probe.split, songs, *result))
    if learns_from_tags:
        for target in {f.target for f in done.figures} - {f.target for f in done.figures if f.songs == "unseen"}:
            done.notes[target].append(TOO_FEW_UNSEEN + (NOT_LOGGED if target == "rating" else ""))
    return done


def _plan_rating(
    table: pd.DataFrame, split: str, group: np.ndarray, options: Options, notes: list[str]
) -> Iterator[Probe]:
    ratings = table["rating"].to_numpy("float64")
    rows = np.flatnonzero(~np.isnan(ratings))
    y, own = ratings[rows], group[rows]
    if len(rows) < MIN_SONGS:
        notes.append(f"Not evaluated: {_songs(len(rows))} rated, at least {MIN_SONGS} are needed.")
        return
    if np.ptp(y) == 0:
        notes.append(f"Not evaluated: all {len(rows)} rated songs have the same rating, {y[0]:g}.")
        return
    if not (parts := folds(own)):
        notes.append(f"Not evaluated by {split}: all rated songs are of one {_GROUP[split]}.")
        return
    if len(rows) < len(table):
        notes.append(f"{len(rows)} of {len(table)} songs are rated.")
    guess, median = probes.constant_guess(y, parts), probes.constant_guess(y, parts, np.median)
    metrics = ("mse", "mae", "correlation")
    probe = partial(Probe, "rating", split=split, metrics=metrics, rows=rows, scored=rows, truth=y, mae_guess=median)
    yield probe("ridge", run=lambda x: probes.ridge(x, y, parts, own), guess=guess)
    nearest = partial(knn.nearest_others, group=own, k=options.k)
    yield probe("knn", run=lambda x: probes.knn_mean(y, nearest(x)[0]), searches=True, guess=probes.others_mean(y, own))
    yield probe("mlp", run=lambda x: probes.mlp(x, y, parts, options.seed), guess=guess)


def _plan_labels(
    table: pd.DataFrame, target: str, split: str, group: np.ndarray, options: Options, notes: list[str]
) -> Iterator[Probe]:
    labels = all_label_ids(table, target)
    one = f"{'an' if target[0] in 'aeiou' else 'a'} {target}"
    first = np.array([own[0] if own else -1 for own in labels], int)
    labelled = np.flatnonzero(first >= 0)
    if len(labelled) < MIN_SONGS:
        notes.append(f"Not evaluated: {_songs(len(labelled))} with {one}, at least {MIN_SONGS} are needed.")
        return
    if (first[labelled] == first[labelled[0]]).all():
        notes.append(f"Not evaluated: all {len(labelled)} songs with {one} have the same one.")
        return
    if len(labelled) < len(table):
        notes.append(f"{_songs(len(table) - len(labelled))} of {len(table)} without {one}: left out.")

    rows = scored_classes(first, group, options)
    names, classes = np.unique(first[rows], return_inverse=True)
    lost = len(labelled) - len(rows), len(np.unique(first[labelled])) - len(names)
    if lost[0]:
        notes.append(
            f"Split by {split}, classification leaves out {_songs(lost[0])} of {lost[1]} {target}s: a class needs"
            f" {options.class_songs} songs, not all of one {_GROUP[split]}, and at most the {options.classes} largest"
            " classes are scored."
        )
    if len(names) < 2 or len(rows) < MIN_SONGS:
        notes.append(f"Not classified, split by {split}: fewer than two {target}s or {MIN_SONGS} songs are left.")
    else:
        guess, metrics = probes.majority_guess(classes), ("accuracy", "macro_f1")
        probe = partial(Probe, target, split=split, metrics=metrics, rows=rows, scored=rows, guess=guess, truth=classes)
        parts = folds(group[rows], classes)
        yield probe("logistic", run=lambda x: probes.logistic(x, classes, parts))
        nearest = partial(knn.nearest_others, group=group[rows], k=options.k)
        yield probe("knn", run=lambda x: knn.vote(classes, *nearest(x)), searches=True)

    retrieval = probes.Retrieval([labels[row] for row in labelled], group[labelled], RETRIEVED)
    if retrieval.scored.sum() < MIN_SONGS:
        notes.append(f"No mAP, split by {split}: fewer than {MIN_SONGS} songs share their {target} with another one.")
        return
    found = partial(knn.nearest_others, group=group[labelled], k=RETRIEVED)
    probe = partial(Probe, target, "retrieval", split, ("map_at_10",), labelled, labelled[retrieval.scored])
    yield probe(run=lambda x: retrieval.average_precision(found(x)[0]), searches=True, guess=retrieval.guess())


def dependent_songs(table: pd.DataFrame, target: str, album: np.ndarray) -> np.ndarray:
    """`(N,)` int: songs with the same number are drawn together in the intervals of a target's figures.

    They are those of an album (and of albums that share a song: album `(N,)` int); for the target artist, those of a
    song's first artist, who is what they are all asked for.
    """
    if target != "artist":
        return album
    first = [own[0] if own else None for own in all_label_ids(table, "artist")]
    own_number = range(len(table), 2 * len(table))  # of a song without an artist
    return np.array([own_number[row] if label is None else label for row, label in enumerate(first)])


def all_label_ids(table: pd.DataFrame, target: str) -> list[list[int]]:
    """All labels of each song as numbers, its class first; names that differ only in case are one label."""
    labels: Iterable[Iterable[Hashable]]
    if target == "album":
        labels = map(album_keys, table["albums"], table["album_artist"], table["artists"])
    elif target == "artist":
        labels = map(artist_keys, table["artists"])
    else:
        labels = map(known_keys, table["genres"])
    number: dict[Hashable, int] = {}
    return [list(dict.fromkeys(number.setdefault(name, len(number)) for name in own)) for own in labels]


def scored_classes(first: np.ndarray, group: np.ndarray, options: Options) -> np.ndarray:
    """Rows of the `options.classes` largest classes of `first (N,)` (-1: none) that can be learned from other songs."""
    songs = pd.DataFrame({"label": first, "group": group})[first >= 0]
    size = songs.groupby("label", sort=False)["group"].agg(["size", "nunique"])
    size = size[(size["size"] >= options.class_songs) & (size["nunique"] >= 2)]
    kept = size.sort_values("size", ascending=False, kind="stable").index[: options.classes]
    return songs.index[songs["label"].isin(kept)].to_numpy()


def _songs(n: int) -> str:
    return f"{n} song{'' if n == 1 else 's'}"
