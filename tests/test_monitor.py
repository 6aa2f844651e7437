"""Gauges against matrices whose answer is known, kNN against scikit-learn."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from torch import Tensor

from simsiam_dali.common.distributed import World
from simsiam_dali.config.load import load_config
from simsiam_dali.evaluation.knn import VOTE_TEMPERATURE
from simsiam_dali.evaluation.knn_scores import knn_labels, knn_rating, label_chance, rating_chance
from simsiam_dali.models.encoder import LossOutput, song_embeddings
from simsiam_dali.training.collapse import LEAST_ROWS, collapse_advice, effective_rank, z_std
from simsiam_dali.training.journal import closing_lines
from simsiam_dali.training.loss_window import GAUGE_ROWS, LossWindow


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(songs: int, seed: int, spread: float = 0.1) -> tuple[Tensor, Tensor]:
    """Songs around six directions, 40 apart in label so that labels are no row numbers."""
    centres = normal(6, 32, seed=99)
    labels = torch.arange(songs) % 6
    return centres[labels] + spread * normal(songs, 32, seed=seed), labels * 40


# Gauges


@pytest.mark.parametrize("d", [64, 2048])
def test_z_std_of_random_directions_is_one_over_root_d(d: int) -> None:
    # Normal rows, normalised, are uniform on the sphere; 512 rows give the std within 1%.
    assert z_std(normal(512, d)).item() == pytest.approx(1 / math.sqrt(d), rel=0.01)


def test_z_std_of_one_point_is_zero_and_ignores_length() -> None:
    point = normal(1, 64)
    assert z_std(point * torch.rand(16, 1).add(1)).item() == pytest.approx(0, abs=1e-6)
    assert z_std(normal(16, 64) * 7).item() == pytest.approx(z_std(normal(16, 64)).item())


def test_z_std_takes_half_precision() -> None:
    z = normal(32, 64).bfloat16()
    assert z_std(z).dtype == torch.float32
    assert z_std(z).item() == pytest.approx(z_std(z.double()).item(), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_of_equal_directions_is_their_number(rank: int) -> None:
    directions = torch.linalg.qr(normal(32, rank)).Q  # orthonormal columns
    z = torch.cat([directions.T, -directions.T]) + 5  # centred on 5, as far out along each direction
    assert effective_rank(z).item() == pytest.approx(rank, rel=1e-4)


def test_effective_rank_of_unequal_directions_is_the_exponential_of_their_entropy() -> None:
    z = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))  # of the variances 9 and 1
    assert effective_rank(z).item() == pytest.approx(math.exp(entropy))


def test_effective_rank_of_one_point_is_one() -> None:
    assert effective_rank(torch.full((8, 4), 2.0)).item() == pytest.approx(1)


def test_effective_rank_of_a_diverged_run_is_nan() -> None:
    assert effective_rank(torch.tensor([[1.0, math.inf], [0, 1]])).isnan()


def test_advice_for_each_kind_of_collapse() -> None:
    healthy = normal(64, 256)
    point = normal(1, 256) + 1e-3 * healthy
    line = torch.linspace(-1, 1, 64)[:, None] * normal(1, 256).sign()  # half the songs point the other way

    def advice(z: Tensor) -> str | None:
        return collapse_advice(z_std(z).item(), z.shape[1], effective_rank(z).item(), len(z))

    assert advice(healthy) is None
    assert "z-std" in (advice(point) or "")
    assert z_std(line).item() > 0.9 / math.sqrt(256)  # z-std alone sees nothing
    assert "about 1.0 directions" in (advice(line) or "")
    assert "diverged" in (advice(healthy * math.nan) or "")
    few = healthy[:4]  # the only batch since a run was resumed: no more than three directions, however healthy
    assert effective_rank(few).item() < 4
    assert advice(few) is None


@pytest.mark.parametrize("rows", [LEAST_ROWS, GAUGE_ROWS])
@pytest.mark.parametrize("d", [128, 512, 2048])
def test_noise_in_many_directions_hides_no_collapse_to_one(rows: int, d: int) -> None:
    """As batch norm leaves it: every dimension has variance 1, nearly all of it or a quarter of it along one line."""

    def advice(along_the_line: float) -> str | None:
        line = normal(rows, 1, seed=1) * normal(1, d, seed=2).sign()
        z = math.sqrt(along_the_line) * line + math.sqrt(1 - along_the_line) * normal(rows, d, seed=3)
        return collapse_advice(z_std(z).item(), d, effective_rank(z).item(), rows)

    for along_the_line in (0.95, 0.99):
        assert "directions (effective rank)" in (advice(along_the_line) or "")
    assert advice(0.5) is None
    assert advice(0.25) is None


def test_variances_that_fall_steeply_are_healthy_until_about_one_direction_is_left() -> None:
    """Trained on real music, SimSiam's have an effective rank of 4 to 9: those in the middle here have 3.8 and 7.4."""
    z, falling = normal(GAUGE_ROWS, 512), torch.logspace(0, -4, 512)
    for steepness, healthy in ((1, True), (10, True), (20, True), (60, False)):
        rank = effective_rank(z * falling**steepness).item()
        assert (collapse_advice(1 / math.sqrt(512), 512, rank, GAUGE_ROWS) is None) == healthy, rank


def test_the_gauges_know_on_how_many_outputs_they_are_computed() -> None:
    config = load_config(assignments=["encoder.batch_size=4"])
    window = LossWindow(World(0, 1, torch.device("cpu")), config)
    scored = LossOutput(torch.tensor(0.0), torch.tensor(True), normal(4, 8))
    window.add(scored)
    window.add(scored)
    assert window.rows == 8
    for _ in range(GAUGE_ROWS):
        window.add(scored)
    assert window.rows == GAUGE_ROWS


# Songs


def test_song_embedding_is_the_mean_of_normalised_segments() -> None:
    segments = torch.tensor([[10.0, 0], [0, 2], [0, -3], [0.5, 0]])
    songs, embeddings = song_embeddings(segments, torch.tensor([7, 3, 3, 7]))
    assert songs.tolist() == [3, 7]
    assert embeddings.tolist() == [[0, 0], [1, 0]]
    _, embeddings = song_embeddings(segments[:2], torch.tensor([4, 4]))
    assert embeddings.tolist() == [[0.5, 0.5]]


# Labels


def test_planted_clusters_are_found() -> None:
    bank, query = clusters(60, seed=1), clusters(30, seed=2)
    assert knn_labels(*bank, *query, k=5) == 1.0


def test_shuffled_labels_score_at_chance() -> None:
    (bank, labels), (query, query_labels) = clusters(600, seed=1), clusters(600, seed=2)
    shuffled = labels[torch.randperm(600, generator=torch.Generator().manual_seed(3))]
    accuracy = knn_labels(bank, shuffled, query, query_labels, k=5)
    chance = label_chance(shuffled, query_labels)
    assert chance == pytest.approx(1 / 6)
    # Four standard deviations of a mean over 600 independent guesses at 1/6.
    assert accuracy == pytest.approx(chance, abs=4 * math.sqrt(1 / 6 * 5 / 6 / 600))


@pytest.mark.parametrize("k", [1, 4, 15])
def test_labels_equal_scikit_learn(k: int) -> None:
    (bank, labels), (query, query_labels) = clusters(200, seed=1, spread=2), clusters(150, seed=2, spread=2)
    reference = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / VOTE_TEMPERATURE),
    ).fit(bank.numpy(), labels.numpy())
    expected = reference.score(query.numpy(), query_labels.numpy())
    assert 0.3 < expected < 0.99
    assert knn_labels(bank, labels, query, query_labels, k=k) == pytest.approx(expected)


def test_a_near_neighbour_outweighs_two_far_ones() -> None:
    bank = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    labels = torch.tensor([5, 6, 6])
    near_five = torch.tensor([[1.0, 0.5]])
    assert knn_labels(bank, labels, near_five, torch.tensor([5]), k=3) == 1.0


def test_ties_go_to_the_first_song_of_the_bank() -> None:
    bank, query = torch.ones(40, 8), torch.ones(3, 8)
    for first, other in [(2, 9), (9, 2)]:
        labels = torch.tensor([first] + [other] * 39)
        for k, expected in [(1, first), (2, first), (3, other)]:  # with 2, one votes for each
            assert knn_labels(bank, labels, query, torch.full((3,), expected), k=k) == 1.0


def test_unknown_labels_neither_vote_nor_are_scored() -> None:
    bank, labels = torch.tensor([[1.0, 0], [1, 0.1], [0, 1]]), torch.tensor([-1, 4, 8])
    query, query_labels = torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.tensor([4, 8, -1])
    assert knn_labels(bank, labels, query, query_labels, k=1) == 1.0
    assert label_chance(labels, query_labels) == 0.5


def test_queries_whose_label_the_bank_lacks_are_not_scored() -> None:
    bank, labels = torch.eye(2), torch.tensor([0, 1])
    assert knn_labels(bank, labels, torch.eye(2), torch.tensor([0, 77]), k=1) == 1.0
    assert math.isnan(knn_labels(bank, labels, torch.eye(2), torch.tensor([77, -1]), k=1))


def test_no_labels_give_nan() -> None:
    unknown = torch.tensor([-1, -1])
    assert math.isnan(knn_labels(torch.eye(2), unknown, torch.eye(2), unknown, k=1))
    assert math.isnan(label_chance(unknown, unknown))


def test_label_chance_of_an_uneven_bank() -> None:
    bank = torch.tensor([3, 8, 8, 8, -1])
    drawn, commonest = (0.75 + 0.25 + 0.25) / 3, 2 / 3
    assert label_chance(bank, torch.tensor([8, 3, 3, 5, -1])) == pytest.approx(drawn)
    assert label_chance(bank, torch.tensor([8, 8, 3, 5, -1])) == pytest.approx(commonest)


def test_many_queries_are_scored_in_parts_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, query = clusters(100, seed=1, spread=2), clusters(90, seed=2, spread=2)
    at_once = knn_labels(*bank, *query, k=5)
    monkeypatch.setattr("simsiam_dali.evaluation.knn.BLOCK", 7)
    assert knn_labels(*bank, *query, k=5) == at_once


# Ratings


def test_ratings_equal_scikit_learn() -> None:
    bank, query = normal(120, 16, seed=1), normal(80, 16, seed=2)
    ratings, truth = torch.sigmoid(bank[:, 0] * 2), torch.sigmoid(query[:, 0] * 2)
    ratings[::7] = math.nan
    truth[::5] = math.nan
    rated, scored = ~ratings.isnan(), ~truth.isnan()
    reference = KNeighborsRegressor(n_neighbors=6, metric="cosine", algorithm="brute")
    expected = reference.fit(bank[rated].numpy(), ratings[rated].numpy()).predict(query[scored].numpy())

    mae, correlation = knn_rating(bank, ratings, query, truth, k=6)
    assert mae == pytest.approx(np.abs(expected - truth[scored].numpy()).mean(), abs=1e-6)
    assert correlation == pytest.approx(np.corrcoef(expected, truth[scored].numpy())[0, 1], abs=1e-6)
    assert correlation > 0.4
    assert mae < rating_chance(ratings, truth)


def test_rating_chance_is_the_error_of_the_median() -> None:
    bank, query = torch.tensor([0.2, 0.6, math.nan]), torch.tensor([0.4, 0.9, math.nan])
    assert rating_chance(bank, query) == pytest.approx(0.25)
    skewed = torch.tensor([1.0, 1, 1, math.nan, 0.8, 0.2])
    assert rating_chance(skewed, skewed) == pytest.approx(0.2)  # that of the mean, 0.8, is 0.24
    assert math.isnan(rating_chance(bank, torch.tensor([math.nan])))
    assert math.isnan(rating_chance(torch.tensor([math.nan]), query))


def test_ratings_that_cannot_be_scored_give_nan() -> None:
    rows, rated, unrated = torch.eye(2), torch.tensor([0.2, 0.8]), torch.full((2,), math.nan)
    assert all(math.isnan(value) for value in knn_rating(rows, unrated, rows, rated, k=1))
    assert all(math.isnan(value) for value in knn_rating(rows, rated, rows, unrated, k=1))


def test_equal_predictions_have_no_correlation() -> None:
    bank, query = normal(30, 8, seed=1), normal(20, 8, seed=2)
    ratings, truth = torch.sigmoid(bank[:, 0].double()), torch.sigmoid(query[:, 0].double())
    mae, correlation = knn_rating(bank, ratings, query, truth, k=30)  # equal but for the order of the sum
    assert mae == pytest.approx((truth - ratings.mean()).abs().mean().item(), abs=1e-6)
    assert math.isnan(correlation)


@pytest.mark.filterwarnings("error")
def test_one_rated_query_has_an_error_but_no_correlation() -> None:
    mae, correlation = knn_rating(torch.eye(2), torch.tensor([0.2, 0.8]), torch.eye(2)[:1], torch.tensor([0.5]), k=1)
    assert mae == pytest.approx(0.3)
    assert math.isnan(correlation)


def test_closing_lines_name_the_untrained_encoder_only_where_it_was_scored() -> None:
    """A journal that was deleted and begins anew has no epoch 0, or nothing of a run that was complete."""
    scores = {"knn/artist": 0.5, "knn/artist_chance": 0.1, "encoder/z_std": 0.04}
    untrained, trained = ({"epoch": epoch} | scores for epoch in (0, 7))
    whole, from_later, none = (list(closing_lines(0.04, Path("run"), e)) for e in ([untrained, trained], [trained], []))
    assert whole[0] == "kNN artist, accuracy 0.500  (untrained encoder 0.500, a guess 0.100)"
    assert from_later[0] == "kNN artist, accuracy 0.500  (a guess 0.100)"
    assert whole[1:] == from_later[1:] == ["z-std 0.0400  (healthy: about 0.0400)", *none]
    assert none == ["checkpoint run/checkpoint.pt", "curves     run/curves.png"]
    counted = list(closing_lines(None, Path("run"), [trained | {"knn/artist_songs": 12.0}]))
    assert counted == ["kNN artist, accuracy 0.500  (a guess 0.100; 12 songs)", *none]
