"""The scores that `equal_time.py` keeps: differences with their intervals, and the table that is made of them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import halves
import numpy as np

from simsiam_dali.common.errors import UserError

BASE, PEER = "the recipe", "SimSiam of lightly's parts"
TAGS_ALONE = "simple (from tags)"
STAGES, UNTRAINED_STAGES = (f"{of}, embedded by stages" for of in (BASE, "untrained encoder"))
TAGGED = ("joint, 2.5 s noisy views of 60 s, windows", "contrastive, 2.5 s noisy views of 60 s, windows")
"""A recipe that learns from tags too, and the same without them."""
FOLDERS = "joint, folders as tags"
FOLDERS_STAGES, FOLDERS_TAGS = (f"{FOLDERS}, embedded by stages{more}" for more in ("", " and tags"))
FOLDERS_LAST = f"{FOLDERS} of the last map"
FOLDERS_LAST_STAGES = f"{FOLDERS_LAST}, embedded by stages"
RESNET50 = "ResNet-50, a quarter as wide"
RESNET50_STAGES, RESNET50_UNTRAINED = (f"{RESNET50}, {how}" for how in ("embedded by stages", "untrained, by stages"))
CONTRASTIVE = "contrastive"
CONTRASTIVE_FOLDERS = "joint, contrastive, folders as tags of the last map"
CONTRASTIVE_STAGES, CONTRASTIVE_FOLDERS_STAGES = (
    f"{row}, embedded by stages" for row in (CONTRASTIVE, CONTRASTIVE_FOLDERS)
)
COMPARED = (
    TAGGED,
    *((row, "SimSiam, 2.5 s noisy views of 60 s") for row in TAGGED),
    (STAGES, UNTRAINED_STAGES),
    (STAGES, TAGGED[0]),
    (STAGES, TAGS_ALONE),
    (RESNET50_STAGES, RESNET50),
    (RESNET50_STAGES, RESNET50_UNTRAINED),
    (RESNET50_STAGES, STAGES),
    (FOLDERS_STAGES, STAGES),
    (FOLDERS_TAGS, STAGES),
    (FOLDERS_LAST_STAGES, STAGES),
    (FOLDERS_LAST_STAGES, TAGS_ALONE),
    (CONTRASTIVE_STAGES, STAGES),
    (CONTRASTIVE_FOLDERS_STAGES, STAGES),
    (CONTRASTIVE_FOLDERS, CONTRASTIVE),
)
"""Rows that differ in what a claim is about."""
CLAIMED = (BASE, STAGES, CONTRASTIVE, *TAGGED)
"""Rows that the pages say something about: they are compared with the peer and with the best baseline too."""
METRICS = ("soundtrack/knn", "soundtrack/map")
RESAMPLES = 4000
RESULTS = halves.ROOT / "benchmarks" / "results" / "real_music"
MIN_SEEDS = 2
"""Seeds after which a candidate may be given up: of one seed there is nothing to resample."""


def newest(result: str) -> Path:
    """The last file of a result's name in the repository."""
    return max(RESULTS.glob(f"{result}-*.json"))


def interval(differences: np.ndarray, soundtracks: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean of `(seeds, songs)` differences: seeds and soundtracks are drawn anew.

    soundtracks `(songs,)`: of each song. The songs of a soundtrack are drawn together, since they are asked for the
    same answer: drawn one by one, the intervals would be too narrow. Seeds and soundtracks are both what another
    experiment would have other ones of (a two-way bootstrap: Owen 2007, doi:10.1214/07-AOAS122).
    """
    rng = np.random.default_rng(0)
    names, of = np.unique(soundtracks, return_inverse=True)
    seeds = len(differences)
    seed_weight = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    song_weight = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)[:, of]
    means = ((seed_weight @ differences) * song_weight).sum(axis=1) / song_weight.sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def shown(differences: np.ndarray, soundtracks: np.ndarray) -> str:
    """The mean, and its interval."""
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(differences.mean(), *interval(differences, soundtracks))


Scores = dict[str, dict[str, list[float]]]
"""Of one training seed: the half learned from -> metric -> the score of each song of the other half."""


def by_seed(row: Mapping[str, Scores], metric: str) -> dict[str, np.ndarray]:
    """Seed -> each song's score, for the seeds that have been trained from both halves."""
    whole = {seed: halves_of for seed, halves_of in row.items() if len(halves_of) == len(halves.HALVES)}
    return {seed: np.concatenate([own[half][metric] for half in halves.HALVES]) for seed, own in whole.items()}


def difference(row: Mapping[str, Scores], base: Mapping[str, Scores], metric: str) -> np.ndarray | None:
    """`(seeds, songs)`: the row's scores minus the other's, of the seeds that both have; None without any."""
    own, other = by_seed(row, metric), by_seed(base, metric)
    common = [seed for seed in own if seed in other]
    return np.stack([own[seed] - other[seed] for seed in common]) if common else None


def is_given_up(doc: Mapping[str, Any], row: str) -> bool:
    """Whether the interval of mAP@10's difference from the recipe lies below 0."""
    known = doc["scores"]
    found = difference(known[row], known[BASE], "soundtrack/map") if row in known else None
    return found is not None and len(found) >= MIN_SEEDS and interval(found, of_songs(doc, "soundtracks"))[1] < 0


def epochs_of(cost: Mapping[str, float], base_epochs: int) -> dict[str, int]:
    """Each candidate's epochs in the time of `base_epochs` of the recipe's. cost: of an epoch, the recipe's being 1."""
    return {row: max(1, round(base_epochs / own)) for row, own in cost.items()}


def for_every_seed(baseline: Mapping[str, Scores], row: Mapping[str, Scores]) -> Mapping[str, Scores]:
    """A baseline's scores for all seeds of a row: where nothing in it is drawn, it has one, the same for all."""
    return dict.fromkeys(row, *baseline.values()) if len(baseline) == 1 else baseline


def of_songs(doc: Mapping[str, Any], key: str) -> np.ndarray:
    """What the document says of each song, in the order of `by_seed`'s scores."""
    return np.concatenate([np.array(doc[key][half]) for half in halves.HALVES])


def untagged_songs(doc: Mapping[str, Any]) -> np.ndarray:
    """Bool `(songs,)`: whether a song has neither artist nor album."""
    first = len(doc["soundtracks"][halves.HALVES[0]])
    listed = np.concatenate([doc["untagged"][halves.HALVES[0]], np.add(doc["untagged"][halves.HALVES[1]], first)])
    return np.isin(np.arange(len(of_songs(doc, "soundtracks"))), listed)


def songs_asked(doc: Mapping[str, Any], chosen: np.ndarray) -> int:
    """How many different songs bool `(songs,)` chooses: of the fifth set both encoders of a seed embed each song."""
    same = doc["soundtracks"][halves.HALVES[0]] == doc["soundtracks"][halves.HALVES[1]]
    return int(chosen.sum()) // (len(halves.HALVES) if same else 1)


def table_lines(doc: Mapping[str, Any]) -> Iterator[str]:
    """The Markdown table."""
    scored = {row: own for row, own in doc["scores"].items() if by_seed(own, METRICS[0])}
    untagged, soundtracks = untagged_songs(doc), of_songs(doc, "soundtracks")
    every = np.full_like(untagged, True)
    unknown = songs_asked(doc, untagged)
    yield f"| | epochs | seeds | 5-NN | | mAP@10 | | mAP@10 of {unknown} untagged songs | |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row, own in {**scored, **doc["baselines"]}.items():
        is_baseline = row not in scored
        is_trained = not is_baseline and row != RESNET50_UNTRAINED
        cells = [str(doc["epochs"][row]) if is_trained else "", str(len(by_seed(own, METRICS[0])))]
        for metric, songs in ((METRICS[0], every), (METRICS[1], every), (METRICS[1], untagged)):
            if not songs.any():  # all are tagged
                cells += ["", ""]
                continue
            cells.append(f"{np.mean([each[songs] for each in by_seed(own, metric).values()]):.3f}")
            gap = None if row == BASE or is_baseline else difference(own, doc["scores"][BASE], metric)
            cells.append("" if gap is None else shown(gap[:, songs], soundtracks[songs]))
        yield f"| {row} | {' | '.join(cells)} |"


def gap_line(doc: Mapping[str, Any], row: str, other: str, songs: np.ndarray | None = None) -> str | None:
    """One row's differences from another, over `songs` (all, where it is None); None where one of them is not there."""
    soundtracks, own = of_songs(doc, "soundtracks"), doc["scores"].get(row, {})
    chosen = np.full(len(soundtracks), True) if songs is None else songs
    base = {**doc["scores"], **doc["baselines"]}.get(other, {})
    if other in doc["baselines"]:
        base = for_every_seed(base, own)
    cells = []
    for metric in METRICS:
        gap = difference(own, base, metric)
        if gap is None:
            return None
        cells.append(shown(gap[:, chosen], soundtracks[chosen]))
    return f"- {row}, minus {other}: 5-NN {cells[0]}, mAP@10 {cells[1]}"


def gap_lines(doc: Mapping[str, Any]) -> Iterator[str]:
    """Differences other than from the recipe: from the peer, the best baseline without an encoder, and between rows."""
    yield from filter(None, (gap_line(doc, row, PEER) for row in CLAIMED))
    features = {name: own for name, own in doc["baselines"].items() if not name.startswith("untrained")}
    mean = {name: np.mean(next(iter(by_seed(own, METRICS[1]).values()))) for name, own in features.items()}
    best = max(mean, key=lambda name: float(mean[name]))
    yield from filter(None, (gap_line(doc, row, best) for row in CLAIMED))
    yield from filter(None, (gap_line(doc, row, other) for row, other in COMPARED))
    untagged = untagged_songs(doc)
    for pair in (TAGGED, (FOLDERS_LAST_STAGES, STAGES)):  # the first of each learns from tags
        for name, songs in (("songs with tags", ~untagged), ("songs without tags", untagged)):
            if songs.any() and (line := gap_line(doc, *pair, songs)):
                yield f"{line}, over the {songs_asked(doc, songs)} {name}"


def together_lines(*docs: Mapping[str, Any]) -> Iterator[str]:
    """The recipe beside the baselines over the songs of several sets, by the seeds that it has in all of them."""
    recipes = [doc["scores"][BASE] for doc in docs]
    soundtracks = np.concatenate([of_songs(doc, "soundtracks") for doc in docs])
    common = [seed for seed in recipes[0] if all(len(own.get(seed, {})) == len(halves.HALVES) for own in recipes)]

    def scores(rows: list[Mapping[str, Scores]], metric: str) -> np.ndarray:
        """`(seeds, songs)`; a row of one seed has the same for all."""
        found = [by_seed(row, metric) for row in rows]
        each = [[own["0"] if len(own) == 1 else own[seed] for own in found] for seed in common]
        return np.stack([np.concatenate(parts) for parts in each])

    yield "| | 5-NN | the recipe's difference | mAP@10 | the recipe's difference |"
    yield "|---|---|---|---|---|"
    for name in (BASE, *(name for name in docs[0]["baselines"] if all(name in doc["baselines"] for doc in docs))):
        cells = []
        for metric in METRICS:
            recipe = scores(recipes, metric)
            own = recipe if name == BASE else scores([doc["baselines"][name] for doc in docs], metric)
            cells += [f"{own.mean():.3f}", "" if name == BASE else shown(recipe - own, soundtracks)]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    yield f"{len(soundtracks)} songs of {len(np.unique(soundtracks))} soundtracks, {len(common)} seeds."


def across_lines(doc: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[str]:
    """The recipe by stages beside what another document has, which compares songs by another rule.

    Both are of the same songs, and of the same encoders where a row is of the recipe.
    """
    own, soundtracks = doc["scores"][STAGES], of_songs(doc, "soundtracks")
    mean = [np.mean([each.mean() for each in by_seed(own, metric).values()]) for metric in METRICS]
    yield f"| {STAGES}, {doc['search']} | 5-NN {mean[0]:.3f} | mAP@10 {mean[1]:.3f} |"
    yield "|---|---|---|"
    rows = {**before["scores"], **{name: for_every_seed(row, own) for name, row in before["baselines"].items()}}
    for name in (BASE, STAGES, PEER, TAGGED[0], "log-mel"):
        gaps = [difference(own, rows[name], metric) for metric in METRICS if name in rows]
        cells = [shown(gap, soundtracks) for gap in gaps if gap is not None]
        if cells:
            yield f"| minus {name}, {before['search']} | {' | '.join(cells)} |"


def longer_lines(doc: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[str]:
    """A longer training of the recipe beside that of another document, which has the same songs."""
    soundtracks, env = of_songs(doc, "soundtracks"), doc["environment"]
    if not np.array_equal(soundtracks, of_songs(before, "soundtracks")):
        raise UserError("the two results are of other songs: measure both again")
    yield "| | epochs | seeds | 5-NN | | mAP@10 | |"
    yield "|---|---|---|---|---|---|---|"
    for row in (STAGES, BASE):
        for of in (before, doc):
            cells = [str(of["epochs"][row]), str(len(by_seed(of["scores"][row], METRICS[0])))]
            for metric in METRICS:
                own, shorter = (np.stack([*by_seed(each["scores"][row], metric).values()]) for each in (of, before))
                # Of other learning rates at every step, so that seeds are no pairs.
                gap = "" if of is before else shown(own.mean(axis=0, keepdims=True) - shorter, soundtracks)
                cells += [f"{own.mean():.3f}", gap]
            yield f"| {row} | {' | '.join(cells)} |"
    yield ""
    yield (
        f"{len(soundtracks)} songs of {len(np.unique(soundtracks))} soundtracks; {env['cpu']}, {env['cores']} cores;"
        f" {env['date']}, commit {env['commit']}."
    )


def page_lines(doc: Mapping[str, Any]) -> Iterator[str]:
    """The table, and what it is of."""
    soundtracks, env = of_songs(doc, "soundtracks"), doc["environment"]
    songs = songs_asked(doc, np.full(len(soundtracks), True))
    yield from table_lines(doc)
    yield ""
    yield from gap_lines(doc)
    yield ""
    yield (
        f"{songs} songs of {len(np.unique(soundtracks))} soundtracks; the time of {doc['base_epochs']}"
        f" epochs of the recipe; {env['cpu']}, {env['cores']} cores; {env['date']}, commit {env['commit']}."
    )
