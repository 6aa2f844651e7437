"""Splits tear no group, probes agree with scikit-learn called by hand, scores with what can be computed by hand."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.evaluation_tables import planted, song_table
from sklearn.decomposition import PCA
from sklearn.dummy import DummyRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.preprocessing import StandardScaler

from simsiam_dali.evaluation import folds as splits
from simsiam_dali.evaluation import knn, probes
from simsiam_dali.evaluation import metrics as scores
from simsiam_dali.evaluation import plan as evaluation
from simsiam_dali.evaluation.knn import VOTE_TEMPERATURE

RNG = np.random.default_rng(7)


def evaluated(
    table: pd.DataFrame, vectors: Mapping[str, np.ndarray], options: evaluation.Options, learns_from_tags: bool = False
) -> evaluation.Evaluation:
    """By vectors that are searched half-whitened, as those of songs of one segment are."""
    searched = {name: knn.unit(x) for name, x in vectors.items()}
    return evaluation.evaluate(table, vectors, searched, options, learns_from_tags)


def standardised(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    return StandardScaler().fit(x[train]).transform(x)


# Splits


@pytest.mark.parametrize("split", splits.SPLITS)
@pytest.mark.parametrize("stratified", [False, True])
def test_no_song_and_no_group_is_on_both_sides(split: str, stratified: bool) -> None:
    table = song_table(90)
    group = splits.groups(table, split)
    classes = np.arange(90) % 6 if stratified else None
    parts = splits.folds(group, classes)
    assert len(parts) == splits.FOLDS
    assert sorted(np.concatenate([test for _, test in parts])) == list(range(90))
    for train, test in parts:
        assert not set(train) & set(test)
        assert not set(group[train]) & set(group[test])


def test_albums_that_share_a_song_are_one_group() -> None:
    table = song_table(6, artists=1, albums=1)
    table["albums"] = [["A"], ["A", "B"], ["B"], ["C"], [], []]
    group = splits.groups(table, "album")
    assert group[0] == group[1] == group[2]
    assert len(set(group)) == 4


def test_an_album_is_identified_by_its_title_and_its_owner() -> None:
    table = song_table(4, artists=4, albums=1)  # four artists, each with an "Album 0"
    assert len(set(splits.groups(table, "album"))) == 4


def test_a_compilation_without_an_album_artist_is_one_album() -> None:
    table = song_table(4, artists=4, albums=1)
    table["album_artist"] = ""
    assert len(set(splits.groups(table, "album"))) == 4
    table["path"] = [f"Hits/{i}.flac" for i in range(4)]
    assert len(set(splits.groups(table, "album"))) == 1


def test_two_files_of_one_recording_are_one_song() -> None:
    table = song_table(5, artists=1)
    table["title"] = ["Same", "same ", "Same", "Other", "Same"]
    table["duration"] = [200.0, 201.9, 207.0, 200.0, math.nan]
    group = splits.groups(table, "song")
    assert group[0] == group[1]
    assert len(set(group)) == 4


def test_the_album_split_catches_a_planted_album() -> None:
    """Each album has a mood of its own that its rating follows; the artists and the next album tell nothing of it."""
    table = song_table(96, artists=4, albums=6)
    album = splits.groups(table, "album")
    table["rating"] = RNG.permutation(np.linspace(0, 1, 24))[album]
    x = planted(album)
    options = evaluation.Options(resamples=200)
    found = {f.name: f for f in evaluated(table, {"embedding": x}, options).figures}
    for probe in ("ridge", "knn", "mlp"):
        by_song = found[f"eval/rating/{probe}_correlation/song_split"].score
        by_album = found[f"eval/rating/{probe}_correlation/album_split"].score
        # Who has heard the album knows the rating; less so by k-NN, as whitening raises noise that has no direction.
        assert by_song.low > 0.15
        assert scores.interval(by_song.resampled - by_album.resampled)[0] > 0.15
        assert by_album.low <= 0


# Probes


def test_ridge_agrees_with_scikit_learn_by_hand() -> None:
    x = RNG.standard_normal((60, 8)).astype(np.float32)
    y = (0.5 + 0.1 * x[:, 0] + 0.1 * RNG.standard_normal(60)).clip(0, 1)
    group = np.arange(60) // 4
    parts = splits.folds(group)
    by_hand = np.empty(60)
    for train, test in parts:
        scaled = standardised(x.astype(np.float64), train)
        inner = splits.folds(group[train], n=3)
        search = GridSearchCV(Ridge(), {"alpha": probes.ALPHAS}, cv=inner, scoring="neg_mean_squared_error")
        by_hand[test] = search.fit(scaled[train], y[train]).predict(scaled[test]).clip(0, 1)
    np.testing.assert_allclose(probes.ridge(x, y, parts, group), by_hand, atol=1e-9)
    assert scores.correlation(y, by_hand) > 0.4


def test_logistic_agrees_with_scikit_learn_by_hand() -> None:
    classes = np.arange(48) % 4
    x = planted(classes, width=6, noise=1.5)
    parts = splits.folds(np.arange(48), classes)
    by_hand = np.empty_like(classes)
    for train, test in parts:
        scaled = standardised(x, train)
        model = LogisticRegression(C=probes.LOGISTIC_C, max_iter=500).fit(scaled[train], classes[train])
        by_hand[test] = model.predict(scaled[test])
    np.testing.assert_array_equal(probes.logistic(x, classes, parts), by_hand)
    assert 0.4 < scores.METRICS["accuracy"].compute(classes, by_hand) < 1


def test_mlp_agrees_with_scikit_learn_by_hand() -> None:
    x = RNG.standard_normal((40, 5)).astype(np.float32)
    y = (0.5 + 0.2 * np.tanh(x[:, 0] * x[:, 1])).astype(np.float64)
    parts = splits.folds(np.arange(40), n=2)
    by_hand = np.empty(40)
    for train, test in parts:
        scaled = standardised(x.astype(np.float64), train)
        mean, std = y[train].mean(), y[train].std()
        model = MLPRegressor(hidden_layer_sizes=(64,), alpha=probes.MLP_ALPHA, max_iter=100, random_state=3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(scaled[train], (y[train] - mean) / std)
        by_hand[test] = model.predict(scaled[test]) * std + mean
    np.testing.assert_allclose(probes.mlp(x, y, parts, seed=3), by_hand.clip(0, 1), atol=1e-6)


def test_knn_agrees_with_scikit_learn_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "BLOCK", 17)  # blocks that do not divide the rows
    classes = np.arange(50) % 5
    x = planted(classes, noise=1.2)
    y = RNG.random(50)
    group = np.arange(50) // 2
    near, cosine = knn.nearest_others(knn.unit(x), group, 4)
    vote, mean = knn.vote(classes, near, cosine), probes.knn_mean(y, near)
    components = PCA().fit_transform(StandardScaler().fit_transform(x))
    scaled = components / components.std(axis=0) ** 0.5
    for row in range(50):
        others = np.flatnonzero(group != group[row])
        settings = {"n_neighbors": 4, "metric": "cosine"}
        regressor = KNeighborsRegressor(**settings).fit(scaled[others], y[others])
        assert mean[row] == pytest.approx(regressor.predict(scaled[[row]])[0])
        voters = KNeighborsClassifier(**settings, weights=lambda d: np.exp((1 - d) / VOTE_TEMPERATURE))
        assert vote[row] == voters.fit(scaled[others], classes[others]).predict(scaled[[row]])[0]


def test_knn_is_right_on_planted_clusters_and_at_chance_on_shuffled_labels() -> None:
    table = song_table(120, artists=12, albums=2).assign(rating=math.nan, genres=pd.Series([[]] * 120))
    x = {"embedding": planted(np.arange(120) % 12)}
    options = evaluation.Options(k=5, resamples=300)
    found = {f.name: f for f in evaluated(table, x, options).figures}
    for split in splits.SPLITS:
        figure = found[f"eval/artist/knn_accuracy/{split}_split"]
        assert figure.score.value == 1.0
        assert figure.verdict == "better than guess"
    table["artists"] = RNG.permutation(table["artists"].to_numpy())
    found = {f.name: f for f in evaluated(table, x, options).figures}
    shuffled = found["eval/artist/knn_accuracy/song_split"]
    assert shuffled.score.low <= 1 / 12 <= shuffled.score.high
    assert shuffled.verdict == "no clear difference from guess"


def test_rows_without_neighbours_are_not_predicted() -> None:
    near, cosine = knn.nearest_others(knn.unit(RNG.standard_normal((3, 2))), np.array([0, 0, 1]), 5)
    assert (near[:, 2:] == -1).all()
    assert (near[2, :2] >= 0).all()
    assert near[0].tolist() == [2, -1, -1, -1, -1]
    alone, cosine = knn.nearest_others(knn.unit(RNG.standard_normal((2, 2))), np.array([0, 0]), 2)
    assert (alone == -1).all()
    assert knn.vote(np.array([0, 1]), alone, cosine).tolist() == [-1, -1]
    assert probes.knn_mean(np.array([0.2, 0.4]), alone) == pytest.approx([0.3, 0.3])


def test_average_precision_by_hand() -> None:
    """Song 0 shares label 7 with 1, 3 and 4, label 8 with 2; song 4 is of its own group and may not be found."""
    labels = [[7, 8], [7], [8], [7], [7], [9], [9]]
    group = np.array([0, 1, 2, 3, 0, 4, 5])
    retrieval = probes.Retrieval(labels, group, k=3)
    assert retrieval.relevant.tolist() == [3, 3, 1, 3, 2, 1, 1]
    near = np.array([[5, 1, 2], [0, 3, 4], [1, 3, 4], [5, 6, 2], [1, 3, 2], [0, 6, 1], [5, -1, -1]])
    by_hand = [(1 / 2 + 2 / 3) / 3, 1, 0, 0, 1, 1 / 2, 1]
    assert retrieval.average_precision(near) == pytest.approx(by_hand)


def test_a_random_order_scores_what_the_formula_says() -> None:
    labels = [[0]] * 4 + [[1]] * 9
    group = np.arange(13)
    retrieval = probes.Retrieval(labels, group, k=5)
    drawn = [
        retrieval.average_precision(np.stack([RNG.permutation(np.delete(group, row))[:5] for row in group]))
        for _ in range(3000)
    ]
    assert np.mean(drawn, axis=0) == pytest.approx(retrieval.guess(), abs=4 * np.std(drawn) / math.sqrt(3000))


# Scores


def test_scores_agree_with_scikit_learn() -> None:
    truth, predicted = RNG.integers(0, 5, 80), RNG.integers(0, 5, 80)
    assert scores.METRICS["accuracy"].compute(truth, predicted) == pytest.approx(accuracy_score(truth, predicted))
    assert scores.macro_f1(truth, predicted) == pytest.approx(f1_score(truth, predicted, average="macro"))
    truth, predicted = truth % 3, np.where(predicted == 4, -1, predicted)  # classes nobody has, and no prediction
    expected = f1_score(truth, predicted, labels=[0, 1, 2], average="macro")
    assert scores.macro_f1(truth, predicted) == pytest.approx(expected)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """A share of 0.6 among 50 songs: the 95% interval holds it in 300 libraries about 285 times."""
    held = 0
    for seed in range(300):
        right = (np.random.default_rng(seed).random(50) < 0.6).astype(float)
        found = scores.score(scores.METRICS["map_at_10"], (right,), np.arange(50), resamples=300, seed=seed)
        held += found.low <= 0.6 <= found.high
    assert 270 <= held <= 297  # 95% less what percentile intervals miss, within three standard deviations


def test_the_interval_allows_for_songs_of_an_album_that_resemble_each_other() -> None:
    """40 albums of 6 songs, a common part of each album and one of each song; true mean 0."""
    album, mean, held, held_by_songs = np.repeat(np.arange(40), 6), scores.METRICS["map_at_10"], 0, 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(40)[album] + rng.standard_normal(240)
        one, many = (scores.score(mean, (x,), groups, 200, 0) for groups in (album, np.arange(240)))
        held += one.low <= 0 <= one.high
        held_by_songs += many.low <= 0 <= many.high
    assert 86 <= held <= 100
    assert held_by_songs < 75


def test_a_resample_has_all_songs_of_the_groups_drawn_as_often_as_these_are() -> None:
    group = np.array([3, 0, 3, 1, 1, 9, 0, 0, *range(10, 17)])
    drawn: list[np.ndarray] = []

    def note(rows: np.ndarray) -> float:
        drawn.append(rows)
        return 0.0

    scores.score(scores.Metric(note, 1), (np.arange(15),), group, 50, 0)
    *resamples, everything = drawn
    assert everything.tolist() == list(range(15))
    for rows in resamples:
        times = np.bincount(rows, minlength=15)
        for number in np.unique(group):
            assert len(set(times[group == number])) == 1
        assert sum(times[np.unique(group, return_index=True)[1]]) == 11  # as many groups as there are


def test_too_few_groups_give_no_interval_and_no_verdict() -> None:
    truth, group = RNG.random(90), np.repeat(np.arange(9), 10)
    good, bad = (scores.score(scores.METRICS["mae"], (truth, truth + e), group, 50, 0) for e in (0.1, 0.5))
    assert math.isnan(good.low)
    assert scores.verdict(scores.METRICS["mae"], good, {"bad": bad}) == "too few groups of songs to tell"


def test_the_verdict_is_about_paired_differences() -> None:
    metric = scores.METRICS["mae"]
    truth = RNG.random(200)
    noise = RNG.standard_normal(200)

    def error(scale: float) -> scores.Score:
        return scores.score(metric, (truth, truth + scale * noise), np.arange(200), 300, 0)

    ours, little_worse = error(1.0), error(1.05)
    assert ours.low < little_worse.value < ours.high  # the intervals overlap, the pairs do not
    assert scores.verdict(metric, ours, {"a": little_worse, "b": error(2)}) == "better than every baseline"
    assert scores.verdict(metric, ours, {"a": little_worse, "b": error(0.9)}) == "worse than b"
    assert scores.verdict(metric, ours, {"a": little_worse, "b": ours}) == "no clear difference from b"
    constant = scores.score(scores.METRICS["correlation"], (truth, np.ones(200)), np.arange(200), 50, 0)
    assert math.isnan(constant.value)
    assert scores.verdict(metric, ours, {"a": constant}) == "no baseline to compare with"
    assert scores.verdict(metric, constant, {"a": ours}) == "undefined: constant"


def test_each_metric_has_its_better_side() -> None:
    """Predictions with less noise are better than those with more, by ratings as by classes."""
    ratings, noise = RNG.random(400), RNG.standard_normal(400)
    classes, drawn, wrong = RNG.integers(0, 4, 400), RNG.random(400), RNG.integers(0, 4, 400)

    def arrays(name: str, error: float) -> scores.Arrays:
        if name in ("mse", "mae", "correlation"):
            return ratings, ratings + error * noise
        predicted = np.where(drawn < error, wrong, classes)
        return ((predicted == classes).astype(float),) if name == "map_at_10" else (classes, predicted)

    for name, metric in scores.METRICS.items():
        good, bad = (scores.score(metric, arrays(name, error), np.arange(400), 100, 0) for error in (0.1, 0.6))
        assert scores.verdict(metric, good, {"bad": bad}) == "better than bad", name
        assert scores.verdict(metric, bad, {"good": good}) == "worse than good", name


# The whole


def test_without_signal_cross_validation_does_not_correlate() -> None:
    """A fold's mean is low where its own songs are high, which alone would correlate at about -0.3 here."""
    found = []
    for seed in range(20):
        table = song_table(50, seed)
        table["rating"] = np.random.default_rng(seed).random(50)
        y, parts = table["rating"].to_numpy(), splits.folds(np.arange(50))
        probe = evaluation.Probe(
            "rating", "ridge", "song", (), np.arange(50), np.arange(50), lambda x: x, probes.constant_guess(y, parts), y
        )
        shrunk = probe.guess + 1e-3 * np.random.default_rng(seed + 99).standard_normal(50)
        assert scores.correlation(y, shrunk) < -0.05
        found.append(scores.correlation(*probe.arrays("correlation", shrunk, np.ones(50, bool))))
    assert abs(np.mean(found)) < 0.1


def test_a_probe_that_predicts_the_mean_is_not_better_than_a_guess_by_any_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Most songs have five stars, some one: the mean has the least squared error, the median the least absolute."""
    table = song_table(100)
    table["rating"] = np.where(np.arange(100) % 4, 1.0, 0.2)
    monkeypatch.setattr(probes, "ridge", lambda _x, y, _parts, _group: np.full_like(y, y.mean()))
    done = evaluated(table, {"e": planted(np.arange(100) % 6)}, evaluation.Options(resamples=200))
    found = {f.metric: f for f in done.figures if (f.probe, f.split, f.songs) == ("ridge", "song", "all")}
    assert found["mae"].baselines["guess"].value == pytest.approx(0.2)
    assert found["mae"].score.value == pytest.approx(0.3)
    assert found["mae"].verdict == "worse than guess"
    assert found["mse"].baselines["guess"].value == pytest.approx(0.12, abs=0.01)


@pytest.mark.parametrize("n", [12, 20, 40])
@pytest.mark.parametrize(("split", "k"), [("song", 10), ("album", 5)])
def test_neighbours_by_random_vectors_do_not_correlate_with_the_rating(n: int, split: str, k: int) -> None:
    """The mean of the others is low where the own rating is high: by song, that alone gives -0.67, -0.27 and -0.10."""
    found = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        table = song_table(n, albums=1).assign(rating=rng.random(n))
        group, x = splits.groups(table, split), rng.standard_normal((n, 8))
        assert len(set(group)) == (n if split == "song" else 6)
        _, probe, _ = evaluation._plan_rating(table, split, group, evaluation.Options(k=k), [])
        assert probe.name == "knn"
        found.append(scores.correlation(*probe.arrays("correlation", probe.run(x), np.ones(n, bool))))
    assert abs(np.mean(found)) < 3.5 * np.std(found) / math.sqrt(200)


def test_neighbours_that_are_all_others_have_no_correlation() -> None:
    table = song_table(10).assign(rating=RNG.random(10))
    done = evaluated(table, {"e": RNG.standard_normal((10, 4))}, evaluation.Options(resamples=20))
    (figure,) = (f for f in done.figures if f.name == "eval/rating/knn_correlation/song_split")
    assert math.isnan(figure.score.value)


def test_the_mean_of_the_other_groups_is_scikit_learns_leave_one_group_out() -> None:
    y, group = RNG.random(30), RNG.integers(3, 9, 30)
    expected = cross_val_predict(DummyRegressor(), y[:, None], y, groups=group, cv=LeaveOneGroupOut())
    assert probes.others_mean(y, group) == pytest.approx(expected)


def test_what_the_encoder_never_saw_is_scored_apart() -> None:
    table = song_table(90)
    figures = evaluated(table, {"e": planted(np.arange(90) % 6)}, evaluation.Options(resamples=20)).figures
    accuracy = {f.songs: f.n for f in figures if f.name.startswith("eval/artist/knn_accuracy/song")}
    assert accuracy == {"all": 90, "unseen": 30}
    table["split"] = "train"
    figures = evaluated(table, {"e": planted(np.arange(90) % 6)}, evaluation.Options(resamples=20)).figures
    assert {f.songs for f in figures} == {"all"}


def test_classes_too_small_or_on_one_album_are_left_out_and_counted() -> None:
    table = song_table(40, artists=4, albums=2)
    table.loc[:1, "artists"] = pd.Series([["Alone"], ["Alone too"]])
    done = evaluated(table, {"e": planted(np.arange(40) % 4)}, evaluation.Options(resamples=20))
    sizes = {f.n for f in done.figures if f.name.startswith("eval/artist/knn")}
    assert sizes == {38}
    assert any("leaves out 2 songs of 2 artists" in said for said in done.notes["artist"])
    table["albums"] = [["One"]] * 40
    done = evaluated(table, {"e": planted(np.arange(40) % 4)}, evaluation.Options(resamples=20))
    assert any(said.startswith("Not classified, split by album") for said in done.notes["artist"])
    assert not [f for f in done.figures if f.target == "artist" and f.split == "album" and f.probe == "knn"]


def test_the_largest_classes_are_kept() -> None:
    first = np.array([0] * 5 + [1] * 7 + [2] * 6 + [-1] * 9 + [3] * 2)
    rows = evaluation.scored_classes(first, np.arange(len(first)), evaluation.Options(classes=2))
    assert set(first[rows]) == {1, 2}
    assert len(rows) == 13


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("rating", math.nan, "Not evaluated: 0 songs rated, at least 10 are needed."),
        ("rating", 0.6, "Not evaluated: all 30 rated songs have the same rating, 0.6."),
        ("artists", ["One"], "Not evaluated: all 30 songs with an artist have the same one."),
        ("genres", [], "Not evaluated: 0 songs with a genre, at least 10 are needed."),
        ("albums", [], "Not evaluated: 0 songs with an album, at least 10 are needed."),
    ],
)
def test_what_cannot_be_evaluated_is_reported_and_the_rest_is_there(column: str, value: Any, said: str) -> None:
    table = song_table(30)
    table[column] = [value] * 30
    done = evaluated(table, {"e": planted(np.arange(30) % 6)}, evaluation.Options(resamples=20))
    target = {"rating": "rating", "artists": "artist", "genres": "genre", "albums": "album"}[column]
    assert said in done.notes[target]
    assert {f.target for f in done.figures} == set(evaluation.TARGETS) - {target}


@pytest.mark.parametrize("n", [1, 2, 5, 11])
def test_tiny_libraries(n: int) -> None:
    table = song_table(n)
    done = evaluated(table, {"e": planted(np.arange(n) % 6)}, evaluation.Options(resamples=20))
    assert all(done.notes[target] for target in evaluation.TARGETS if n < 11)


def test_of_equally_near_songs_the_first_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a stable sort of all cosines has it, also where more songs are equally near than are asked for."""
    monkeypatch.setattr(knn, "BLOCK", 7)
    bank = knn.l2_normalised(RNG.integers(-1, 2, (60, 3)).astype(np.float32) + 0.5)
    query = knn.l2_normalised(RNG.integers(-1, 2, (20, 3)).astype(np.float32) + 0.5)
    cosine = np.concatenate([block.copy() for _, block in knn.cosine_blocks(query, bank)])
    expected = np.argsort(-cosine, axis=1, kind="stable")
    for k in (1, 5, 60):
        found, near = knn.nearest(query, bank, k)
        np.testing.assert_array_equal(found, expected[:, :k])
        np.testing.assert_array_equal(near, np.take_along_axis(cosine, expected[:, :k], axis=1))


def test_what_players_write_for_no_genre_is_none() -> None:
    table = song_table(5).assign(genres=pd.Series([["Unknown"], ["none"], ["-"], ["Rock", "<unknown>"], ["rock"]]))
    assert evaluation.all_label_ids(table, "genre") == [[], [], [], [0], [0]]
