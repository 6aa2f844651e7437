"""Segments that stop decoding while a loader runs: named, listed, left out; all others come as if nothing had been."""

import csv
import functools
import os
import re
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import running
from helpers.signals import Array, noise, shard_set, write_shards

from simsiam_dali import embed
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.schema import AugmentationConfig
from simsiam_dali.data import loader as loader_module
from simsiam_dali.data.graph import GraphConfig, LogMel, Source
from simsiam_dali.data.loader import Loader
from simsiam_dali.data.quarantine import COLUMNS, Quarantine
from simsiam_dali.data.shards import ShardSet, open_shards
from simsiam_dali.embedding.table import read_embeddings

SECONDS = 0.5
SEGMENTS = 23
BATCH = 4


def small_set(folder: Path, waves: Iterable[Array] | None = None, packed: str = "once", **options: Any) -> ShardSet:
    """Three tars of 9, 9 and 5 segments, each a song of its own."""
    waves = list(waves or (noise(SECONDS, seed) for seed in range(SEGMENTS)))
    tars, _ = write_shards(folder, waves, per_tar=9, **options)
    return shard_set(tars, SECONDS, options.get("codec", "flac"), packed)


def load(
    shards: ShardSet, mode: Any = "views", shuffle_buffer: int = 8, limit: float = 0.5, ranks: int = 1, rank: int = 0,
    **settings: Any,
) -> Loader:  # fmt: skip
    source = Source(
        tuple(shards.tars("train")), tuple(shards.indexes("train")), shards.codec, False, SECONDS, rank, ranks,
        shuffle_buffer,
    )  # fmt: skip
    graph = GraphConfig(source, LogMel(), mode, SECONDS, AugmentationConfig(time_mask_param=5))
    settings = {"count": SEGMENTS, "batch_size": BATCH, "threads": 2, "prefetch": 3, "seed": 0, **settings}
    return Loader(graph, quarantine=Quarantine(shards, limit), **settings)


def damage(shards: ShardSet, row: int, kept: int = 100, part: int = 0) -> None:
    """Overwrite a sample's audio (part 0) or row (1) from byte `kept` on, in place, as a failing disk would."""
    tar = shards.root / shards.segments["shard"][row]
    words = tar.with_suffix(".idx").read_text().splitlines()[1 + row % 9].split()[4 * part :]
    with tar.open("r+b") as file:
        file.seek(int(words[1]) + kept)
        file.write((b"no music" * (int(words[2]) // 8 + 1))[: int(words[2]) - kept])


Batches = list[list[tuple[Any, ...]]]


def samples(loader: Loader, batches: int) -> Batches:
    """Each batch as its samples: (row, the bytes of each view)."""
    return [
        [(int(row), *(x[n].numpy().tobytes() for x in batch.inputs)) for n, row in enumerate(batch.segment)]
        for batch in islice(loader.endless(), batches)
    ]


def without(batches: Batches, rows: set[int]) -> Batches:
    return [[sample for sample in batch if sample[0] not in rows] for batch in batches]


def listed(shards: ShardSet) -> list[dict[str, str]]:
    with (shards.root / "quarantine.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_tar_cut_short_while_it_is_read_is_named(tmp_path: Path) -> None:
    """Mapped into memory, it would end the process with a bus error."""
    shards = small_set(tmp_path)
    loader = load(shards, shuffle_buffer=2)
    batches = loader.endless()
    next(batches)
    for tar in shards.tars("train"):
        os.truncate(tar, 512)
    with pytest.raises(UserError, match=r"the shards cannot be read .*train-00000\d"):
        for _ in islice(batches, 3 * len(loader)):
            pass


@pytest.mark.parametrize(("mode", "shuffle_buffer"), [("views", 8), ("clean", 0), ("raw", 8)])
@pytest.mark.parametrize("kept", [0, 3000])  # DALI names the sample only where its header can be read
def test_all_other_segments_are_unchanged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, shuffle_buffer: int, kept: int
) -> None:
    shards = small_set(tmp_path)
    expected = samples(load(shards, mode, shuffle_buffer), 17)  # three turns and some
    damage(shards, 11, kept)
    loader = load(shards, mode, shuffle_buffer)
    assert samples(loader, 17) == without(expected, {11})
    (line,) = listed(shards)
    assert {k: line[k] for k in ("shard", "key", "row", "song")} == {
        "shard": "train-000001.tar", "key": "000000011", "row": "11", "song": "song 11.mp3",
    }  # fmt: skip
    # What follows is libsndfile's last error of any thread: another thread that opens a segment may have cleared it.
    assert ("Failed to open encoded data" if kept == 0 else "got 0 samples") in line["reason"]
    assert "train-000001.tar 000000011 (song 11.mp3)" in capsys.readouterr().err


@pytest.mark.gpu
def test_all_other_segments_are_unchanged_on_the_device(tmp_path: Path) -> None:
    shards = small_set(tmp_path)
    expected = [batch.segment.tolist() for batch in islice(load(shards, gpu=0).endless(), 17)]
    damage(shards, 11)
    found = [batch.segment.tolist() for batch in islice(load(shards, gpu=0).endless(), 17)]
    assert found == [[row for row in batch if row != 11] for batch in expected]


def test_a_whole_shard_at_once(tmp_path: Path) -> None:
    shards = small_set(tmp_path)
    expected = samples(load(shards, batch_size=11), 6)
    for row in range(9, 18):
        damage(shards, row, kept=row % 2 * 100)
    assert samples(load(shards, batch_size=11), 6) == without(expected, set(range(9, 18)))
    assert sorted(int(line["row"]) for line in listed(shards)) == list(range(9, 18))


def test_also_what_decodes_to_nothing_usable(tmp_path: Path) -> None:
    """DALI takes these without a word: too few samples, NaN, and a row that leads to no song."""
    waves = [noise(SECONDS, seed) for seed in range(SEGMENTS)]
    expected = samples(load(small_set(tmp_path / "sound", waves, codec="wav", subtype="FLOAT"), "raw", 0), 6)
    waves[3], waves[8] = waves[3][:100], np.where(np.arange(len(waves[8])) == 77, np.nan, waves[8])
    shards = small_set(tmp_path / "bad", waves, codec="wav", subtype="FLOAT")
    damage(shards, 20, 0, part=1)
    assert samples(load(shards, "raw", 0), 6) == without(expected, {3, 8, 20})
    reasons = {int(line["row"]): line["reason"] for line in listed(shards)}
    assert reasons.keys() == {3, 8, 20}
    assert "too short" in reasons[3]
    assert "not finite" in reasons[8]
    assert ".row is damaged" in reasons[20]


def test_a_state_holds_what_is_skipped(tmp_path: Path) -> None:
    """Kept before the fault, and after it; the list itself may be lost."""
    shards = small_set(tmp_path)
    expected = samples(load(shards), 17)
    at = next(n for n, batch in enumerate(expected) if 11 in [sample[0] for sample in batch])
    damage(shards, 11)
    for stop in (at, at + 1, at + 3):
        (tmp_path / "quarantine.csv").unlink(missing_ok=True)
        loader = load(shards)
        samples(loader, stop)
        state = loader.state_dict()
        assert state["left_out"] == ([11] if stop > at else [])
        (tmp_path / "quarantine.csv").unlink(missing_ok=True)
        restored = load(shards)
        restored.load_state_dict(state)
        assert samples(restored, 17 - stop) == without(expected[stop:], {11})


def test_what_is_listed_is_skipped_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = small_set(tmp_path)
    expected = samples(load(shards), 7)
    damage(shards, 11)
    samples(load(shards), 6)
    monkeypatch.setattr(loader_module, "find_undecodable", None)  # nobody has to look
    assert samples(load(shards), 7) == without(expected, {11})
    assert len(listed(shards)) == 1


def test_packed_again_nothing_is_skipped_and_the_old_list_stays(tmp_path: Path) -> None:
    shards = small_set(tmp_path)
    damage(shards, 11)
    samples(load(shards), 18)
    before = listed(shards)
    again = small_set(tmp_path, packed="again")
    assert again.fingerprint != shards.fingerprint
    assert {sample[0] for batch in samples(load(again), 18) for sample in batch} == set(range(SEGMENTS))
    damage(again, 11)
    samples(load(again), 18)
    assert listed(again)[:1] == before
    assert [line["row"] for line in listed(again)] == ["11", "11"]


def test_ranks_keep_their_steps_and_their_parts(tmp_path: Path) -> None:
    shards = small_set(tmp_path)
    expected = [samples(load(shards, ranks=2, rank=rank), 8) for rank in range(2)]
    damage(shards, 4)
    damage(shards, 15)
    loaders = [load(shards, ranks=2, rank=rank) for rank in range(2)]
    assert [samples(loader, 8) for loader in loaders] == [without(part, {4, 15}) for part in expected]
    assert len(loaders[0]) == len(loaders[1]) == SEGMENTS // (2 * BATCH)
    assert sorted(int(line["row"]) for line in listed(shards)) == [4, 15]
    ordered = [load(shards, "clean", 0, ranks=2, rank=rank) for rank in range(2)]
    assert sorted(int(row) for each in ordered for batch in each for row in batch.segment) == [
        row for row in range(SEGMENTS) if row not in (4, 15)
    ]


def test_too_many_stop_the_run_with_the_list(tmp_path: Path) -> None:
    shards = small_set(tmp_path)
    for row in (4, 15):
        damage(shards, row)
    with pytest.raises(UserError) as refusal:
        samples(load(shards, limit=1.5 / SEGMENTS), 6)
    message = str(refusal.value)
    assert message.startswith("2 of 23 segments do not decode, more than data.max_bad_fraction = 0.0652")
    assert "train-000000.tar 000000004 (song 4.mp3), train-000001.tar 000000015 (song 15.mp3)" in message
    assert len(listed(shards)) == 2
    with pytest.raises(UserError, match="2 of 23 segments do not decode"):
        load(shards, limit=0.01)  # and does not begin again


def test_a_batch_of_one_cannot_be_learned_from(tmp_path: Path) -> None:
    shards = small_set(tmp_path)
    damage(shards, 11)
    with pytest.raises(UserError, match=r"^of a batch of 2 segments 1 are not in .*: use a larger --batch-size$"):
        samples(load(shards, batch_size=2), 12)


def test_a_micro_batch_of_one_keeps_its_placeholder(tmp_path: Path) -> None:
    """What takes micro-batches reads no rows, and a run could not go on: it keeps its micro-batch, and the order."""
    shards = small_set(tmp_path)
    damage(shards, 11)
    given = samples(load(shards, batch_size=2, group=2), 10)
    assert {len(batch) for batch in given} == {2}
    assert listed(shards)


@pytest.mark.parametrize("mode", ["views", "clean"])
def test_a_header_that_states_any_length_is_no_want_of_memory(tmp_path: Path, mode: str) -> None:
    """The decoder asks for as much memory as the 36 bits of a FLAC file's number of samples say."""
    shards = small_set(tmp_path)
    tar = shards.root / shards.segments["shard"][11]
    offset = int(tar.with_suffix(".idx").read_text().splitlines()[1 + 11 % 9].split()[1])
    with tar.open("r+b") as file:
        file.seek(offset + 21)  # the last 36 of the 64 bits from byte 18 on
        first = file.read(1)[0]
        file.seek(offset + 21)
        file.write(bytes([first | 0x0F, 0xFF, 0xFF, 0xFF, 0xFF]))
    rows = [row for batch in samples(load(shards, mode=mode, shuffle_buffer=0), 6) for row, *_ in batch]
    assert sorted(rows) == [row for row in range(SEGMENTS) if row != 11]
    assert [int(line["row"]) for line in listed(shards)] == [11]


def test_a_split_of_fewer_segments_than_processes_is_one_clear_line(tmp_path: Path) -> None:
    shards = small_set(tmp_path)
    with pytest.raises(UserError, match=r"^2 segments cannot be shared by 4 processes: use 2 processes or fewer"):
        load(shards, mode="clean", shuffle_buffer=0, ranks=4, rank=1, count=2)


def test_a_tar_that_cannot_be_opened_is_one_clear_line(tmp_path: Path) -> None:
    shards = small_set(tmp_path)
    (tmp_path / "train-000001.tar").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"^the shards cannot be read \(.*train-000001\.tar"):
        load(shards)


@pytest.mark.parametrize("cut", ["2026-01-01,train-0000", '2026-01-01,train-000000.tar,000000005,5,"An artist, a so'])
def test_what_a_crash_cut_short_does_not_swallow_the_next_line(tmp_path: Path, cut: str) -> None:
    shards = small_set(tmp_path)
    (tmp_path / "quarantine.csv").write_text(",".join(COLUMNS) + "\n" + cut)
    Quarantine(shards, 1.0).add({3: "why"})
    assert Quarantine(shards, 1.0).rows == {3}


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"when;shard;key;row\n", "no columns row and set"), (b"when,row,set\nBj\xf6rk", "no CSV in UTF-8")],
)
def test_a_list_that_a_spreadsheet_wrote_anew_is_one_clear_line(tmp_path: Path, content: bytes, says: str) -> None:
    shards = small_set(tmp_path)
    (tmp_path / "quarantine.csv").write_bytes(content)
    with pytest.raises(UserError, match=says):
        Quarantine(shards, 1.0)


def test_a_fault_that_passes_skips_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error whose cause nobody finds, such as a network's, gets one more try, and no more."""
    shards = small_set(tmp_path)
    expected = samples(load(shards), 12)
    tar = tmp_path / "train-000001.tar"
    sound = tar.read_bytes()

    def passes(*_: object) -> dict[int, str]:
        with tar.open("r+b") as file:
            file.write(sound)
        return {}

    damage(shards, 11)
    monkeypatch.setattr(loader_module, "find_undecodable", passes)
    assert samples(load(shards), 12) == expected
    damage(shards, 11)
    monkeypatch.setattr(loader_module, "find_undecodable", lambda *_: {})
    with pytest.raises(UserError, match=r"^the data graph stopped \(Error decoding file"):
        samples(load(shards), 12)


def add_some(shards: ShardSet, rows: list[int]) -> None:
    for row in rows:
        Quarantine(shards, 1.0).add({row: f"reason {row}, with\na comma and a line"})


def test_several_at_once_add_whole_lines(tmp_path: Path) -> None:
    shards = small_set(tmp_path)
    (tmp_path / "quarantine.csv").write_text(",".join(COLUMNS) + "\nbefore,x,y,3,song,mine,of another set\n")
    parts = [list(range(n, SEGMENTS, 3)) for n in range(3)] + [[0, 1, 2]]
    with ThreadPoolExecutor(len(parts)) as pool:  # the lock is of the open file: threads are as good as processes
        list(pool.map(functools.partial(add_some, shards), parts))
    lines = listed(shards)
    assert lines[0]["reason"] == "mine"
    assert sorted(int(line["row"]) for line in lines[1:]) == list(range(SEGMENTS))
    assert Quarantine(shards, 1.0).rows == set(range(SEGMENTS))


@pytest.mark.parametrize("line", ["a,b", ",x,y,99,song,why,{set}", ",x,y,word,song,why,{set}"])
def test_a_list_that_cannot_be_read_is_one_clear_line(tmp_path: Path, line: str) -> None:
    shards = small_set(tmp_path)
    (tmp_path / "quarantine.csv").write_text(",".join(COLUMNS) + "\n" + line.format(set=shards.fingerprint) + "\n")
    if line == "a,b":
        assert Quarantine(shards, 0.0).rows == set()  # of no set that we know
        return
    with pytest.raises(UserError, match=r"quarantine.csv line 2 names no segment"):
        Quarantine(shards, 0.0)


@pytest.mark.faults
def test_a_run_and_its_embedding_continue_without_them(
    tmp_path: Path, small_shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_shards(Path(shutil.copytree(small_shards, tmp_path / "shards")))
    bad = [0, shards.count("train") + 2]  # one to train on, one to validate
    for row in bad:
        running.mark_damaged(shards, row)
    stopped = running.run(running.command(tmp_path, shards.root, mlflow__enabled="false"), tmp_path)
    assert stopped.returncode == 1
    assert re.search(
        r"^error: 1 of \d+ segments do not decode, more than data.max_bad_fraction = 0.01", stopped.stderr, re.M
    )
    (tmp_path / "shards/quarantine.csv").unlink()

    over = {"data__max_bad_fraction": 0.2, "encoder__epochs": 1}
    done = running.run(running.command(tmp_path, shards.root, "--run-name", "on", **over), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [done.stderr.count(f" {row:09d} (") for row in bad] == [1, 1]
    assert sorted(int(line["row"]) for line in listed(shards)) == bad
    run_dir = tmp_path / "runs/on"
    assert [r["data/quarantined"] for r in running.records(run_dir) if "epoch" in r] == [2, 2]
    from mlflow import MlflowClient  # here: the GPU tests of this file run where MLflow is not installed

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("music_recommendation").experiment_id])
    assert run.data.metrics["data/quarantined"] == 2

    again = running.run(running.command(tmp_path, shards.root, "--run-name", "again", **over), tmp_path)
    assert f"skipping 2 segments that did not decode: see {shards.root}/quarantine.csv" in again.stdout
    assert running.losses(tmp_path / "runs/again") == running.losses(run_dir)

    table = tmp_path / "e.parquet"
    words = ["embed", "--checkpoint", str(run_dir), "--out", str(table), "--per-segment", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", words)
    embed.main()
    assert "without 2 segments that do not decode" in capsys.readouterr().out
    rows = read_embeddings(table).table["segment"]
    assert list(rows) == [row for row in range(len(shards.segments)) if row not in bad]


def test_the_memory_of_a_dropped_batch_is_its_own(tmp_path: Path) -> None:
    shards = small_set(tmp_path)
    damage(shards, 11)
    held = [(batch.inputs[0], batch.inputs[0].clone()) for batch in islice(load(shards).endless(), 12)]
    assert all(torch.equal(x, copy) for x, copy in held)
