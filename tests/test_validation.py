"""Which epochs are validated, and that what is kept between validations changes no score."""

import contextlib
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import Config
from simsiam_dali.data import loader
from simsiam_dali.data.loader import Loader
from simsiam_dali.data.shards import open_shards
from simsiam_dali.training import data as training_data
from simsiam_dali.training import validation
from simsiam_dali.training.data import TrainingData, log_mel_settings, with_statistics, with_threads
from simsiam_dali.training.learner import Learner
from simsiam_dali.training.validation import Validation, epochs_between

SETTINGS = {
    "data.view_seconds": 1.5,
    "data.threads": 1,
    "encoder.batch_size": 4,
    "encoder.epochs": 7,
    "encoder.simsiam.backbone": "resnet18",
    "encoder.simsiam.projection_dim": 16,
    "encoder.simsiam.predictor_hidden_dim": 4,
    "encoder.simsiam.n_mels": 16,
    "encoder.simsiam.augmentation.frequency_mask_param": 4,
    "encoder.simsiam.augmentation.time_mask_param": 8,
    "train.device": "cpu",
    "mlflow.enabled": False,
}


def counts(train: int, val: int) -> Any:
    """A shard set of which only the numbers of segments matter."""
    return SimpleNamespace(count={"train": train, "val": val}.__getitem__, segment_seconds=10.0)


def config(**over: object) -> Config:
    return load_config(command_line={**SETTINGS, **{k.replace("__", "."): v for k, v in over.items()}})


@pytest.mark.parametrize("encoder", ["simsiam", "simple"])
@pytest.mark.parametrize(("train", "val"), [(100, 30), (20_000, 2_000), (100_000, 1_000), (50, 50)])
def test_validation_takes_at_most_a_tenth_of_the_passes_and_no_less_often_than_that(
    encoder: str, train: int, val: int
) -> None:
    chosen = config(encoder__encoder_type=encoder)
    every = epochs_between(chosen, counts(train, val))
    views = {"simsiam": 2, "simple": 1}[encoder]
    scored = val * (views + 1) + min(train, chosen.train.knn_segments)  # loss, and embeddings of queries and bank
    trained = 3 * views * train  # forward and backward
    assert scored <= 0.1 * every * trained
    assert every == 1 or scored > 0.1 * (every - 1) * trained


def test_short_views_count_by_their_length() -> None:
    """Two views of 10 s and four of 2.5 s are as three of 10 s."""
    shorter = {"data__short_views": 4, "data__short_view_seconds": 2.5}
    for train, val in ((100, 30), (50, 50)):
        beside = epochs_between(config(data__view_seconds=10, **shorter), counts(train, val))
        assert beside == epochs_between(config(data__view_seconds=10, data__views=3), counts(train, val))


def test_a_number_is_kept_as_it_is() -> None:
    assert epochs_between(config(train__validate_every=3), counts(10, 1000)) == 3


def opened(shards: Path, **over: Any) -> Validation:
    chosen = config(data__shards=shards, **over)
    found, world = open_shards(shards), World(0, 1, torch.device("cpu"))
    log_mel = with_statistics(log_mel_settings(chosen), -30.0, 15.0)
    data = TrainingData(chosen, found, world, log_mel, loader=None)  # type: ignore[arg-type]  # of the training split
    return Validation(data, Learner(chosen, found, world))


def test_the_first_every_nth_and_the_last_epoch_are_due(small_shards: Path) -> None:
    checked = opened(small_shards, train__validate_every=3)
    assert [epoch for epoch in range(8) if checked.due(epoch)] == [0, 3, 6, 7]


@pytest.mark.parametrize("encoder", ["simsiam", "simple"])
def test_scores_are_the_same_whether_the_views_are_kept_or_computed_again(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    built: list[int] = []
    begin = Loader.begin

    def beginning(self: Loader, seed: int) -> None:
        built.append(seed)
        begin(self, seed)

    monkeypatch.setattr(Loader, "begin", beginning)
    found = {}
    for kept, graphs in ((2**28, 0), (0, 3)):
        monkeypatch.setattr(validation, "KEPT_BYTES", kept)
        checked = opened(small_shards, encoder__encoder_type=encoder)
        first = checked.scores()
        built.clear()
        second = checked.scores()
        assert len(built) == graphs  # the loss's views, the bank and the queries
        assert math.isfinite(first["encoder/val_loss"])
        pd.testing.assert_series_equal(pd.Series(first), pd.Series(second), rtol=0, atol=0)
        found[kept] = first
    of_kept, of_computed = map(pd.Series, found.values())
    pd.testing.assert_series_equal(of_kept, of_computed, rtol=0, atol=0)


def test_what_does_not_fit_whole_is_not_kept(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the views would save nothing, and would take memory."""
    whole = opened(small_shards)
    expected = whole.scores()
    sizes = {key: sum(x.nbytes for batch in kept for x in batch.inputs) for key, kept in whole._kept.items()}
    monkeypatch.setattr(validation, "KEPT_BYTES", max(sizes.values()) + 1)
    partly = opened(small_shards)
    for _ in range(2):
        assert partly.scores() == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert 0 < len(partly._kept) < len(sizes)
    assert partly._free == max(sizes.values()) + 1 - sum(sizes[key] for key in partly._kept)


@pytest.fixture
def graphs_at_release(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(graphs that were built, those still there), at each time that DALI releases its unused memory."""
    built: list[weakref.ref[Any]] = []
    noted: list[tuple[int, int]] = []
    backend: Any = loader.backend  # DALI's stubs lack ReleaseUnusedMemory
    build, release = Loader._build, backend.ReleaseUnusedMemory

    def building(self: Loader, state: str | None) -> None:
        build(self, state)
        built.append(weakref.ref(self.pipeline))

    def releasing() -> None:
        noted.append((len(built), sum(ref() is not None for ref in built)))
        release()

    monkeypatch.setattr(Loader, "_build", building)
    monkeypatch.setattr(backend, "ReleaseUnusedMemory", releasing)
    return noted


def test_a_validation_releases_the_memory_of_its_graphs(
    small_shards: Path, graphs_at_release: list[tuple[int, int]]
) -> None:
    """DALI's pools on a GPU keep what they had, and its pipelines are cycles: both would stand beside the model."""
    opened(small_shards).scores()
    assert graphs_at_release == [(1, 0), (2, 0), (3, 0)]


def test_threads_are_tried_one_graph_at_a_time(
    small_shards: Path, graphs_at_release: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_data.os, "sched_getaffinity", lambda _: range(4))
    chosen, shards = config(data__shards=small_shards, data__threads="auto"), open_shards(small_shards)
    tuned = with_threads(chosen, shards, log_mel_settings(chosen), World(0, 1, torch.device("cpu")))
    assert tuned.data.threads in (1, 2, 4)
    assert graphs_at_release == [(tried + 1, 0) for tried in range(len(graphs_at_release))]
    assert len(graphs_at_release) >= 2


@pytest.mark.parametrize(
    ("rates", "tried", "chosen"),
    [
        ({16: 100, 8: 50}, [16, 8], 16),  # cores bind: as many threads as there are
        ({16: 100, 8: 97, 4: 96, 2: 60}, [16, 8, 4, 2], 4),  # the fewest that are as fast
        ({16: 90, 8: 100, 4: 93}, [16, 8, 4], 8),  # fewer are faster
        ({12: 100, 6: 99, 3: 99, 1: 99}, [12, 6, 3, 1], 1),
    ],
)
def test_the_threads_are_the_fewest_that_are_as_fast(
    rates: dict[int, int], tried: list[int], chosen: int, small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their loaders are imitated: a batch moves the clock on by what its number of threads takes."""
    now, asked = [0.0], []

    class Imitated:
        def __init__(self, threads: int) -> None:
            self.threads = threads
            asked.append(threads)

        def endless(self) -> Iterator[None]:
            while True:
                now[0] += 1 / rates[self.threads]
                yield None

    monkeypatch.setattr(training_data.os, "sched_getaffinity", lambda _: range(max(rates)))
    monkeypatch.setattr(training_data.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(training_data, "create_loader", lambda trial, *_, **__: Imitated(trial.data.threads))
    settings, shards = config(data__shards=small_shards, data__threads="auto"), open_shards(small_shards)
    tuned = with_threads(settings, shards, log_mel_settings(settings), World(0, 1, torch.device("cpu")))
    assert (asked, tuned.data.threads, tuned.data.prefetch) == (tried, chosen, 2)


def test_ranks_with_unequal_cores_try_the_same_threads(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial ends with a collective call: a rank that made one more would wait for good."""
    asked = []

    class Other(World):
        """A rank beside one that has two cores."""

        def gather(self, value: Any) -> list[Any]:
            return [value, 2 if isinstance(value, int) and not isinstance(value, bool) else value]

    def loader(trial: Config, *_: object, **__: object) -> SimpleNamespace:
        asked.append(trial.data.threads)
        return SimpleNamespace(endless=lambda: iter(range(100)))

    monkeypatch.setattr(training_data.os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(training_data, "create_loader", loader)
    settings, shards = config(data__shards=small_shards, data__threads="auto"), open_shards(small_shards)
    with_threads(settings, shards, log_mel_settings(settings), Other(1, 2, torch.device("cpu")))
    assert asked[0] == 2


def test_the_encoder_is_in_training_mode_again_afterwards(small_shards: Path) -> None:
    checked = opened(small_shards)
    checked.learner.encoder.train()
    state = {name: x.clone() for name, x in checked.learner.encoder.state_dict().items()}
    checked.scores()
    assert checked.learner.encoder.training
    assert all(torch.equal(x, state[name]) for name, x in checked.learner.encoder.state_dict().items())


@pytest.mark.parametrize("decode", [(True, False), (False, False)])
def test_a_rank_of_which_no_segment_decodes_takes_part(decode: tuple[bool, bool]) -> None:
    """The others' segments are scored; where nobody has any, one line says so."""
    batch = SimpleNamespace(segment=torch.tensor([1, 0]), inputs=(torch.tensor([[3.0, 0.0], [0.0, 2.0]]),))
    batches = [[batch] if whole else [] for whole in decode]

    def rank(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        def gather(own: list[Any]) -> list[list[Any]]:
            assert len(own) == len(batches[number])
            return [[(b.segment, b.inputs[0]) for b in of] for of in batches]

        encoder = SimpleNamespace(embed=lambda x: x)
        self = SimpleNamespace(
            _batches=lambda *_: batches[number],
            kind=SimpleNamespace(embeds="clean"),
            learner=SimpleNamespace(autocast=contextlib.nullcontext, encoder=encoder),
            world=SimpleNamespace(gather=gather),
            _song=torch.tensor([7, 5]),
        )
        return validation.Validation._songs(self, "val", 2)  # type: ignore[arg-type]

    for number in range(2):
        if any(decode):
            songs, embeddings = rank(number)
            assert songs.tolist() == [5, 7]
            assert embeddings.tolist() == [[1.0, 0.0], [0.0, 1.0]]
        else:
            with pytest.raises(UserError, match="no val segment decodes"):
                rank(number)
