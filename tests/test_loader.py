"""The loader: each segment once an epoch, in an order of its own, resumable at any batch."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.signals import Array, noise, reference_log_mel, shard_set, song, write_shards

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.schema import AugmentationConfig
from simsiam_dali.data import pipeline
from simsiam_dali.data.graph import GraphConfig, LogMel, Source
from simsiam_dali.data.loader import Batch, Loader, device_fault, measure_log_mel
from simsiam_dali.data.quarantine import Quarantine

SECONDS = 0.5
SEGMENTS = 23  # no multiple of any batch below
FRAMES = LogMel().frames(SECONDS)


@pytest.fixture(scope="module")
def waves() -> list[Array]:
    return [noise(SECONDS, seed) for seed in range(SEGMENTS)]


@pytest.fixture(scope="module")
def source(waves: list[Array], tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Three tars of 9, 9 and 5 segments."""
    tars, indexes = write_shards(tmp_path_factory.mktemp("shards"), waves, per_tar=9)
    assert len(tars) == 3
    return Source(tars, indexes, "flac", native_rate=False, segment_seconds=SECONDS)


ALL_DRAWN = {"time_mask_param": 5, "mixup_prob": 0.5, "crop_prob": 0.5}
"""The default probabilities, and those that are off by default."""


def load(
    source: Source, mode: Any = "raw", shuffle_buffer: int = 0, ranks: int = 1, rank: int = 0, **settings: Any
) -> Loader:
    source = replace(source, shuffle_buffer=shuffle_buffer, num_shards=ranks, shard_id=rank)
    graph = GraphConfig(source, LogMel(), mode, SECONDS, AugmentationConfig(**ALL_DRAWN))
    settings = {"count": SEGMENTS, "batch_size": 4, "threads": 2, "prefetch": 2, "seed": 0, **settings}
    return Loader(graph, quarantine=quarantine(source), **settings)


def quarantine(source: Source) -> Quarantine:
    """One that lets no segment be damaged."""
    return Quarantine(shard_set([Path(tar) for tar in source.tars], source.segment_seconds), limit=0)


def rows(batches: Any) -> list[int]:
    return [row for batch in batches for row in batch.segment.tolist()]


# --- DALI's thread pool


def test_the_thread_pools_notice_is_not_printed(source: Source, capfd: pytest.CaptureFixture[str]) -> None:
    next(iter(load(source)))
    assert os.environ[pipeline.NEW_THREAD_POOL] == "1"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("fails", [False, True])
def test_what_else_a_build_writes_is_passed_on(fails: bool, capfd: pytest.CaptureFixture[str]) -> None:
    class Writes:
        def build(self) -> None:
            os.write(2, b"a warning\n\n!!! Forced use of NewThreadPool !!!\nanother\n")
            if fails:
                raise RuntimeError("cannot be built")

    if fails:
        with pytest.raises(RuntimeError, match="cannot be built"):
            pipeline.build_on_new_pool(Writes())
    else:
        pipeline.build_on_new_pool(Writes())
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "a warning\nanother\nafter\n"


def test_the_old_thread_pool_gives_the_same_batches(source: Source) -> None:
    """In a process of its own: DALI reads the variable once."""
    program = (
        "import hashlib, pickle, sys\n"
        "load, source = pickle.load(sys.stdin.buffer)\n"
        "digest = hashlib.sha256()\n"
        "batches = load(source, 'views', shuffle_buffer=8)\n"
        "[digest.update(x.numpy().tobytes()) for batch in batches for x in batch.inputs]\n"
        "print(digest.hexdigest())\n"
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", program],
            input=pickle.dumps((load, source)),
            env=os.environ | {pipeline.NEW_THREAD_POOL: pool, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for pool in "01"
    ]
    assert digests[0] == digests[1] != b""


# --- what a batch is


def test_a_batch_of_views(source: Source) -> None:
    batch = next(iter(load(source, "views", shuffle_buffer=8)))
    assert isinstance(batch, Batch)
    for view in (batch.inputs[0], batch.inputs[1]):
        assert view.shape == (4, 128, FRAMES)
        assert view.dtype == torch.float32
        assert view.is_contiguous()
    assert batch.segment.shape == (4,)
    assert batch.segment.dtype == torch.int64
    assert not torch.equal(batch.inputs[0], batch.inputs[1])


def test_a_batch_of_waves_holds_the_segments_of_its_rows(source: Source, waves: list[Array]) -> None:
    for batch in load(source, shuffle_buffer=8):
        assert isinstance(batch, Batch)
        assert batch.inputs[0].dtype == torch.float32
        for wave, row in zip(batch.inputs[0], batch.segment.tolist(), strict=True):
            np.testing.assert_allclose(wave, waves[row], atol=2e-5)  # 16 bits


def test_batches_stay_as_they_were_given(source: Source) -> None:
    # The tensors are DALI's own buffers: none may be written again while somebody holds it.
    loader = load(source, shuffle_buffer=8)
    held, copies = [], []
    for _ in range(3):
        for batch in loader:
            held.append(batch.inputs[0])
            copies.append(batch.inputs[0].clone())
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


# --- the shuffled order


@pytest.mark.parametrize("shuffle_buffer", [1, 5, SEGMENTS, 1000])
@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 4), (1, 23), (2, 4), (3, 2), (4, 5)])
def test_no_segment_comes_twice_in_an_epoch(source: Source, shuffle_buffer: int, ranks: int, batch_size: int) -> None:
    loaders = [
        load(source, shuffle_buffer=shuffle_buffer, ranks=ranks, rank=rank, batch_size=batch_size)
        for rank in range(ranks)
    ]
    steps = SEGMENTS // (ranks * batch_size)
    assert [len(loader) for loader in loaders] == [steps] * ranks  # DDP: every rank makes the same steps
    for number in range(1, 5):
        epoch = list(chain.from_iterable(rows(loader) for loader in loaders))
        assert len(set(epoch)) == len(epoch) == steps * ranks * batch_size
        # What an epoch leaves over is read, and not decoded.
        assert [loader.decoded for loader in loaders] == [number * steps * batch_size] * ranks


@pytest.mark.parametrize(("ranks", "batch_size", "group"), [(1, 4, 2), (1, 2, 5), (2, 2, 3), (4, 1, 2)])
def test_an_epoch_holds_whole_groups(source: Source, ranks: int, batch_size: int, group: int) -> None:
    """In the order of an epoch without groups; what fills no group is not decoded."""
    settings = {"shuffle_buffer": 8, "ranks": ranks, "batch_size": batch_size}
    loaders = [load(source, rank=rank, group=group, **settings) for rank in range(ranks)]
    alone = [rows(load(source, rank=rank, **settings)) for rank in range(ranks)]
    steps = SEGMENTS // (ranks * batch_size * group) * group
    for number in range(1, 4):
        parts = [rows(loader) for loader in loaders]
        assert [len(part) for part in parts] == [steps * batch_size] * ranks
        assert len(set(chain.from_iterable(parts))) == steps * batch_size * ranks
        assert [loader.decoded for loader in loaders] == [number * steps * batch_size] * ranks
        if number == 1:
            assert parts == [part[: steps * batch_size] for part in alone]
    too_large = rf"^a batch of 24 is larger than the data set \(\d+ segments\): use --batch-size {SEGMENTS} or less"
    with pytest.raises(UserError, match=too_large):
        load(source, shuffle_buffer=8, batch_size=4, group=6)
    with pytest.raises(UserError, match=r"segments\): pack more songs$"):  # a batch has two segments or more
        load(source, shuffle_buffer=8, batch_size=4, group=6, ranks=SEGMENTS)


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 4), (2, 2), (4, 5), (4, 1)])
def test_what_divides_comes_whole_each_epoch(waves: list[Array], tmp_path: Path, ranks: int, batch_size: int) -> None:
    tars, indexes = write_shards(tmp_path, waves[:20], per_tar=9)
    source = Source(tars, indexes, "flac", native_rate=False, segment_seconds=SECONDS)
    loaders = [
        load(source, shuffle_buffer=8, ranks=ranks, rank=rank, batch_size=batch_size, count=20) for rank in range(ranks)
    ]
    for _ in range(4):
        assert sorted(chain.from_iterable(rows(loader) for loader in loaders)) == list(range(20))


def test_no_segment_is_dropped_for_long(source: Source) -> None:
    loader = load(source, shuffle_buffer=8)  # of 23 each epoch leaves out 3
    assert set(chain.from_iterable(rows(loader) for _ in range(3))) == set(range(SEGMENTS))


def turns(source: Source, number: int, **settings: Any) -> list[list[int]]:
    """The first `number` orders in which all segments come."""
    loader = load(source, **{"shuffle_buffer": 8, "batch_size": SEGMENTS, **settings})
    return [rows(loader) for _ in range(number)]


def test_the_order_differs_between_epochs_and_seeds_and_is_repeatable(source: Source) -> None:
    orders = turns(source, 3)
    others = turns(source, 3, seed=1)
    assert all(sorted(order) == list(range(SEGMENTS)) for order in orders + others)
    assert len({tuple(order) for order in [*orders, *others, list(range(SEGMENTS))]}) == 7
    assert turns(source, 3, threads=1, prefetch=1) == orders


def test_the_order_is_new_each_epoch_beyond_the_shuffle_buffer(source: Source) -> None:
    orders = turns(source, 4, shuffle_buffer=1)  # a buffer of one segment shuffles nothing
    for a, b in combinations(orders, 2):
        moved = np.abs(np.argsort(a) - np.argsort(b))  # how far each segment moved
        assert moved.mean() > SEGMENTS / 6  # a third of the length, for a random permutation


def test_a_rank_sees_the_other_ranks_parts_in_later_epochs(source: Source) -> None:
    loader = load(source, shuffle_buffer=8, ranks=3, rank=0, batch_size=1)
    assert len(set(chain.from_iterable(rows(loader) for _ in range(7)))) > SEGMENTS // 2


def test_ranks_draw_differently(source: Source) -> None:
    views = [next(iter(load(source, "views", 1, ranks=2, rank=rank, batch_size=8))) for rank in range(2)]
    masks = [(batch.inputs[0] == 0).any(dim=1) for batch in views]
    assert not torch.equal(*masks)


# --- the stored order


@pytest.mark.parametrize("batch_size", [4, 23, 30])
def test_an_ordered_loader_gives_every_segment_once_in_order(source: Source, batch_size: int) -> None:
    loader = load(source, batch_size=batch_size)
    for _ in range(3):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert rows(batches) == list(range(SEGMENTS))
        assert all(batch.inputs[0].shape[0] == len(batch.segment) for batch in batches)


@pytest.mark.parametrize(("ranks", "batch_size"), [(3, 4), (3, 7), (2, 11), (5, 1), (3, 8)])
def test_ranks_part_an_ordered_epoch(source: Source, ranks: int, batch_size: int) -> None:
    loaders = [load(source, ranks=ranks, rank=rank, batch_size=batch_size) for rank in range(ranks)]
    assert len({len(loader) for loader in loaders}) == 1
    for _ in range(3):
        parts = [rows(loader) for loader in loaders]
        assert sorted(chain.from_iterable(parts)) == list(range(SEGMENTS))  # disjoint and complete
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


# --- state


@pytest.mark.parametrize("shuffle_buffer", [8, 0])
@pytest.mark.parametrize("after", [0, 1, 3, 5, 6, 10, 11])  # batches; an epoch has 5, or 6 when ordered
def test_a_restored_loader_continues_bit_for_bit(source: Source, shuffle_buffer: int, after: int) -> None:
    mode = "views" if shuffle_buffer else "clean"
    loader = load(source, mode, shuffle_buffer)
    endless = (batch for _ in iter(int, 1) for batch in loader)
    before = list(islice(endless, after))
    assert len(before) == after
    state = loader.state_dict()
    expected = list(islice(endless, 9))

    # Another process, which happens to run more threads.
    restored = load(source, mode, shuffle_buffer, threads=3)
    restored.load_state_dict(state)
    again = list(islice((batch for _ in iter(int, 1) for batch in restored), 9))
    for a, b in zip(expected, again, strict=True):
        assert torch.equal(a.segment, b.segment)
        assert all(torch.equal(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))
    if shuffle_buffer:
        assert restored.decoded == 9 * 4  # the left-over batch of each epoch is not decoded after a restart either


def test_a_state_of_another_graph_is_refused(source: Source) -> None:
    state = load(source, "views", shuffle_buffer=8).state_dict()
    with pytest.raises(UserError, match=r"^cannot resume: the checkpoint was written by another version"):
        load(source, "raw", shuffle_buffer=8).load_state_dict(state)


def test_an_epoch_left_and_restored_has_its_remaining_batches(source: Source) -> None:
    loader = load(source, "raw", 8)
    whole = [batch.segment.tolist() for batch in load(source, "raw", 8)]
    states = [(loader.state_dict(), loader.step) for _ in loader]
    for state, step in (states[1], states[-1]):
        restored = load(source, "raw", 8)
        restored.load_state_dict(state)
        assert [batch.segment.tolist() for batch in restored] == whole[step:]
        assert len(list(restored)) == len(whole)  # and the next epoch is a whole one


# --- what the user may get wrong


def test_a_batch_larger_than_the_data_set(source: Source) -> None:
    with pytest.raises(UserError, match=r"^a batch of 24 .* \(23 segments\): use --batch-size 23 or less"):
        load(source, shuffle_buffer=8, batch_size=24)
    with pytest.raises(UserError, match=r"batch of 8 on each of 3 processes .* --batch-size 7 or less"):
        load(source, shuffle_buffer=8, batch_size=8, ranks=3)


@pytest.mark.parametrize("kept", [0, 100, 3000])  # bytes before the damage: none, the header, some frames
def test_a_damaged_segment_is_one_clear_line(waves: list[Array], tmp_path: Path, kept: int) -> None:
    tars, indexes = write_shards(tmp_path, waves)
    _, offset, size, *_ = indexes[0].read_text().splitlines()[3].split()
    with tars[0].open("r+b") as tar:
        tar.seek(int(offset) + kept)
        tar.write(b"no music" * ((int(size) - kept) // 8))
    loader = load(Source(tars, indexes, "flac", native_rate=False, segment_seconds=SECONDS), batch_size=2)
    with pytest.raises(UserError) as refusal:
        list(loader)
    message = str(refusal.value)
    assert "\n" not in message
    assert "1 of 23 segments do not decode" in message
    assert "train-000000.tar 000000002 (song 2.mp3)" in message
    assert "python -m simsiam_dali.pack --verify" in message


def test_a_segment_too_short_for_a_view_is_one_clear_line(waves: list[Array], tmp_path: Path) -> None:
    tars, indexes = write_shards(tmp_path, [waves[0], waves[1][:2000]])
    source = Source(tars, indexes, "flac", native_rate=False, segment_seconds=SECONDS)
    with pytest.raises(UserError, match=r"^1 of 2 segments do not decode.*python -m simsiam_dali.pack --verify"):
        list(load(source, "views", 2, count=2, batch_size=2))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Error in GPU operator `fn.spectrogram`,\nencountered:\n\nCUDA allocation failed"),
         "ran out of GPU memory with batches of 4: use --batch-size 2"),
        (RuntimeError("CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY (2):\nout of memory"), "ran out of GPU memory"),
        (RuntimeError("Error in GPU operator `fn.erase`,\nencountered:\n\nCan't allocate 99 bytes on device 0."),
         "ran out of GPU memory"),
        (MemoryError("std::bad_alloc"), "ran out of host memory with batches of 4"),
        (RuntimeError("encountered:\n\nCUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal access"),
         "the GPU or its driver is to blame: CUDA runtime API error cudaErrorIllegalAddress"),
    ],
)  # fmt: skip
def test_memory_and_the_gpu_are_not_mistaken_for_a_damaged_segment(
    source: Source, error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = load(source, shuffle_buffer=8)

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(loader, "_outputs", fails)
    with pytest.raises(UserError) as refusal:
        next(iter(loader))
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "damaged" not in str(refusal.value)


@pytest.mark.parametrize("times", [1, 2])
def test_a_gpu_without_memory_is_tried_once_more_from_the_same_batch(
    times: int, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch may hold in its cache what DALI asks for. The device is imitated: the graph runs on the CPU."""
    wanted = list(load(source, "views", shuffle_buffer=8))
    loader = load(source, "views", shuffle_buffer=8)
    real = loader._outputs
    calls: list[int] = []

    def outputs() -> Any:
        calls.append(len(calls))
        if len(calls) > 2 and len(errors) < times:
            errors.append("Can't allocate 99 bytes on device 0.")
            raise RuntimeError(errors[-1])
        loader.gpu = None
        try:
            return real()
        finally:
            loader.gpu = 0

    errors: list[str] = []
    monkeypatch.setattr(loader, "_outputs", outputs)
    loader.gpu = 0
    if times == 2:
        with pytest.raises(UserError, match="ran out of GPU memory"):
            list(loader)
        return
    for got, want in zip(loader, wanted, strict=True):
        assert torch.equal(got.segment, want.segment)
        assert all(torch.equal(a, b) for a, b in zip(got.inputs, want.inputs, strict=True))
    assert len(errors) == 1


def test_out_of_memory_in_micro_batches_the_step_s_batch_may_stay() -> None:
    told = device_fault(MemoryError("std::bad_alloc"), batch_size=4, group=8)
    assert told
    assert "with batches of 4: use a smaller train.micro_batch, or shorter views" in told


# --- statistics


def test_measured_mean_and_std_are_those_of_the_log_mel(tmp_path: Path) -> None:
    songs = [song(2.0, seed) for seed in range(7)]
    tars, indexes = write_shards(tmp_path, songs)
    source = Source(tars, indexes, "flac", native_rate=False, segment_seconds=2.0)
    graph = GraphConfig(source, LogMel(), "clean", 2.0, AugmentationConfig())
    for segments, used in ((100, 7), (4, 4), (3, 4)):  # whole batches
        loader = Loader(graph, count=7, batch_size=2, threads=2, prefetch=2, seed=0, quarantine=quarantine(source))
        measured = measure_log_mel(loader, segments)
        stored = [np.round(wave * 32768) / 32768 for wave in songs[:used]]
        expected = np.stack([reference_log_mel(wave.astype(np.float32)) for wave in stored])
        assert measured == LogMel(mean=measured.mean, std=measured.std)
        assert measured.mean == pytest.approx(expected.mean(), abs=0.02)
        assert measured.std == pytest.approx(expected.std(), abs=0.02)


# --- the GPU


@pytest.mark.gpu
def test_batches_lie_on_the_device(source: Source) -> None:
    on_cpu, on_gpu = (load(source, "views", 8, gpu=gpu) for gpu in (None, 0))
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert {b.inputs[0].device, b.inputs[1].device} == {torch.device("cuda", 0)}
        assert b.segment.device == torch.device("cpu")  # the reader's output, not pinned
        assert not b.segment.is_pinned()
        assert a.segment.tolist() == b.segment.tolist()
    held = [(batch.inputs[0], batch.inputs[0].clone()) for batch in on_gpu]
    assert all(torch.equal(x, copy) for x, copy in held)


@pytest.mark.gpu
def test_a_restored_loader_continues_on_the_device(source: Source) -> None:
    loader = load(source, "views", 8, gpu=0)
    next(iter(loader))
    state = loader.state_dict()
    restored = load(source, "views", 8, gpu=0)
    restored.load_state_dict(state)
    for a, b in zip(loader, restored, strict=True):
        assert a.segment.tolist() == b.segment.tolist()
        torch.testing.assert_close(a.inputs[0], b.inputs[0], rtol=0, atol=1e-5)
