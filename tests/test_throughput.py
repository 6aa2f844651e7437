"""The benchmark counts what it times, freezes who waits, sees who sleeps, and its tables hold the files' numbers."""

import json
import multiprocessing
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fork_server
from helpers.fake_stages import broken, numbered, numbers, numbers_of, only_one, ticking, vanishing
from helpers.groups import alive_in_group, until
from helpers.running import ROOT, forked_stages
from helpers.signals import frequency, noise, tone
from torch import Tensor

sys.path.insert(0, str(ROOT / "benchmarks"))
import document
import gpu_report
import material
import measure
import report
import result_text
import throughput
from baselines import Segments
from measure import FrozenStage, Stage, Window, interleaved, summary, timed_window
from stages import Spec, open_stage, random_batch, trained
from torch_views import Views

from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config, replace_settings
from simsiam_dali.config.schema import AugmentationConfig, Config
from simsiam_dali.data.graph import LogMel
from simsiam_dali.data.loader import Batch
from simsiam_dali.data.shards import open_shards
from simsiam_dali.training.data import create_loader

CPU = torch.device("cpu")
TINY = {
    "data.view_seconds": 1.0,
    "data.threads": 1,
    "data.shuffle_buffer": 8,
    "encoder.batch_size": 4,
    "encoder.simsiam.backbone": "resnet18",
    "encoder.simsiam.projection_dim": 16,
    "encoder.simsiam.predictor_hidden_dim": 4,
    "encoder.simsiam.n_mels": 16,
    "encoder.simsiam.augmentation.frequency_mask_param": 4,
    "encoder.simsiam.augmentation.time_mask_param": 8,
    "train.device": "cpu",
}
NEVER = {f"{name}_prob": 0.0 for name in ("time_shift", "time_stretch", "pitch_shift", "noise", "gain", "reverb")}


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """As stages have processes of their own, torch's threads here would only disturb."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def stages_by_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's process does not import torch and DALI anew; `test_the_three_named_commands` has the real start."""
    monkeypatch.setattr(measure, "_CONTEXT", multiprocessing.get_context("forkserver"))


@pytest.fixture(scope="module")
def tiny(small_shards: Path) -> Config:
    return load_config(command_line={**TINY, "data.shards": small_shards})


# --- 1. exactly the samples it timed


def test_a_window_counts_the_batches_between_its_first_and_its_last() -> None:
    """With a unit of 3 it holds whole turns; the batch before it belongs to no window."""
    stage = Stage(numbered(4), unit=3)
    first = timed_window(stage, 0.0, batches=5)
    second = timed_window(stage, 0.0)
    assert first.segments == list(range(4, 28))  # batches 1 to 6: 5, made full
    assert second.segments == list(range(32, 44))  # batch 7 goes before; 8 to 10
    assert first.samples_per_s == len(first.segments) / first.seconds


def test_a_window_lasts_as_long_as_it_says_and_ends_with_a_batch() -> None:
    def slow() -> Iterator[Tensor]:
        for ids in numbered(2):
            time.sleep(0.02)
            yield ids

    window = timed_window(Stage(slow()), 0.1)
    batches = len(window.segments) // 2
    assert window.seconds >= max(0.1, 0.02 * batches)  # each of its batches was made within it
    assert batches >= 1


@pytest.mark.parametrize("kind", ["loader/read", "loader/decode", "loader/mel", "loader/light", "loader/all", "train"])
def test_windows_of_real_stages_hold_the_loaders_segments(tiny: Config, kind: str) -> None:
    """An epoch's windows and the batches before them hold each segment of the training split once."""
    stage = open_stage(Spec(kind, tiny, "cpu", 1))
    total = open_shards(tiny.data.shards).count("train")
    seen: list[int] = []
    whole = stage.batches

    def noted() -> Iterator[Tensor]:
        for ids in whole:
            seen.extend(ids.tolist())
            yield ids

    stage.batches = noted()
    windows = [timed_window(stage, 0.0, batches=2) for _ in range(total // 4 // 3)]
    parts = [seen[start : start + 12] for start in range(0, len(seen), 12)]
    assert [w.segments for w in windows] == [part[4:] for part in parts]
    assert len(seen) == len(windows) * 12
    assert max(Counter(seen).values()) == 1
    assert set(seen) <= set(range(total + open_shards(tiny.data.shards).count("val")))


@pytest.mark.parametrize("kind", ["baseline/light", "baseline/full", "baseline/songs", "baseline/gpu_full"])
def test_baselines_give_the_segments_of_the_training_split(tiny: Config, kind: str) -> None:
    stage = open_stage(Spec(kind, tiny, "cpu", 1))
    segments = open_shards(tiny.data.shards).segments
    train = set(segments.index[segments["split"] == "train"])
    ids = torch.cat(list(islice(stage.batches, len(train) // 4))).tolist()
    assert set(ids) <= train
    if kind != "baseline/gpu_full":  # webdataset's resampled shards draw with replacement
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("kind", ["loader/read", "loader/decode", "loader/all", "train"])
def test_what_a_stage_decodes_is_counted_where_it_is_decoded(tiny: Config, kind: str) -> None:
    """Two epochs whose segments are no whole number of batches: each segment given was decoded, and no other."""
    total = open_shards(tiny.data.shards).count("train")
    assert total % 3
    stage = open_stage(Spec(kind, replace_settings(tiny, encoder__batch_size=3), "cpu", 1))
    window = timed_window(stage, 0.0, batches=2 * (total // 3))
    assert window.decoded == len(window.segments)
    assert summary([window], 1.0)["decoded_over_given"] == 1


def test_a_stage_that_decodes_more_than_it_returns_is_reported() -> None:
    windows = [Window([0] * 100, 1.0, None, 1, 1, 0, 0, decoded) for decoded in (100, 110)]
    assert summary(windows, 1.0)["decoded_over_given"] == 1.05
    assert "decoded_over_given" not in summary([Window([0], 1.0, None, 1, 1, 0, 0)], 1.0)


# --- the material


@pytest.mark.parametrize(
    ("sizes", "segments"), [({16}, 256), ({16, 128}, 2048), ({4, 16, 64}, 1024), ({24, 16}, 384), ({100, 99}, 9900)]
)
def test_the_material_is_whole_batches_and_enough_of_them(sizes: set[int], segments: int) -> None:
    assert material.enough_segments(sizes) == segments


def test_batch_sizes_without_a_near_common_multiple_leave_one_batch_over() -> None:
    assert material.enough_segments({127, 128, 125}) == 16 * 128


@pytest.mark.parametrize(
    ("options", "segments"),
    [
        ([], 256),
        (["--batch-size", "40"], 640),
        (["--sweep", "batch"], 1024),
        (["--stages", "loader/light", "baseline/light"], 256),
        (["--stages", "train", "--set", "encoder.batch_size=48"], 768),
    ],
)
def test_the_command_asks_for_material_for_what_it_measures(
    options: list[str], segments: int, small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[int] = []

    def packed(least: int, *_: object) -> Path:
        asked.append(least)
        return small_shards

    monkeypatch.setattr(material, "packed_generated", packed)
    throughput.Bench(throughput.build_parser().parse_args(["--device", "cpu", *options]))
    assert asked == [segments]


def test_generated_songs_are_songs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two have the same audio, or the packer would take them for one; all formats of the composed ones come."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(material, "COMPOSED", 4)
    monkeypatch.setattr(material, "SONG_SECONDS", (6.0, 6.0))
    monkeypatch.setattr(material, "_SEGMENT_SECONDS", 3.0)
    shards = open_shards(material.packed_generated(20, 2))
    assert shards.count("train") == 20
    assert shards.songs["audio_hash"].nunique() == 10
    assert {Path(path).suffix for path in shards.songs["path"]} == {".flac", ".ogg", ".mp3", ".wav"}
    again = material.packed_generated(20, 2)
    assert open_shards(again).fingerprint == shards.fingerprint


def test_too_few_segments_are_reported_in_one_line(small_shards: Path, capsys: Any) -> None:
    throughput.Bench(throughput.build_parser().parse_args(["--device", "cpu", "--shards", str(small_shards)]))
    (line,) = capsys.readouterr().err.splitlines()
    count = open_shards(small_shards).count("train")
    assert line.startswith(f"warning: {count} training segments are fewer than 16 batches of 16")


def test_the_sums_are_the_windows() -> None:
    windows = [
        Window(list(range(n)), seconds, share, 10 * n, 7, 0, 3)
        for n, seconds, share in ((10, 1.0, 0.1), (40, 2.0, 0.3), (90, 3.0, 0.2))
    ]
    entry = summary(windows, view_seconds=36.0)
    assert (entry["samples_per_s"], entry["low"], entry["high"]) == (20, 10, 30)
    assert (entry["audio_hours_per_s"], entry["x_realtime"]) == pytest.approx((0.2, 720))
    assert (entry["samples"], entry["seconds"], entry["windows"]) == (140, 6.0, 3)
    assert entry["data_wait_share"] == 0.2
    assert entry["host_bytes"] == [100, 400, 900]


# --- 2. stages take turns


def tick(file: Path) -> float:
    return float(file.read_text())


def test_a_stage_and_its_children_stand_still_between_windows(tmp_path: Path) -> None:
    file = tmp_path / "tick"
    stage = FrozenStage("ticking", ticking, (file,), warm_up=0.05)
    group = stage.process.pid
    assert group is not None
    try:
        stage.open()
        until(lambda: set(alive_in_group(group).values()) == {"T"})
        assert len(alive_in_group(group)) == 2
        frozen = tick(file)
        time.sleep(0.1)
        assert tick(file) == frozen
        window = stage.window(0.05)
        assert window.segments[0] > 0
        until(lambda: bool(stage.window(0.05) and tick(file) > frozen))  # the child may get no core in one of them
    finally:
        stage.close()
    until(lambda: not alive_in_group(group))
    last = tick(file)
    time.sleep(0.1)
    assert tick(file) == last  # the child is gone too


def test_a_stage_that_cannot_open_is_one_clear_error_and_does_not_stop_the_others() -> None:
    stages: dict[str, tuple[Callable[..., Stage], tuple[str, ...]]] = {
        "broken": (broken, ("no such thing",)),
        "vanishing": (vanishing, ()),
        "good": (numbers, ()),
    }
    windows, errors = interleaved(stages, 2, 0.0, say=lambda _: None)
    # Batches of two: one and two more to warm up, one before each window, one in it.
    assert {name: [w.segments for w in came] for name, came in windows.items()} == {"good": [[8, 9], [12, 13]]}
    first, second = map(str, errors)
    assert first == "broken: no such thing"
    assert second.startswith("vanishing died")


def test_a_stage_that_dies_between_its_windows_is_one_clear_error() -> None:
    stage = FrozenStage("killed", numbers, (), warm_up=0.0)
    try:
        stage.open()
        stage.process.kill()
        stage.process.join()
        with pytest.raises(UserError, match="killed died"):
            stage.window(0.0)
    finally:
        stage.close()


def test_stages_that_do_not_fit_beside_each_other_are_open_one_at_a_time(tmp_path: Path) -> None:
    stages = dict.fromkeys(("first", "second"), (only_one, (tmp_path / "lock",)))
    windows, errors = interleaved(stages, 2, 0.0, say=lambda _: None, together=False)
    assert not errors
    assert {name: [w.segments for w in came] for name, came in windows.items()} == {
        "first": [[8, 9], [12, 13]], "second": [[8, 9], [12, 13]],
    }  # fmt: skip
    _, errors = interleaved(stages, 1, 0.0, say=lambda _: None)
    assert [str(e) for e in errors] == ["second: there is room for one only"]


@pytest.mark.parametrize(
    ("device", "kinds", "turns"),
    [
        ("gpu", ("loader/train", "model", "train"), False),
        ("gpu", ("loader/light", "baseline/gpu_light"), True),
        ("cpu", ("loader/train", "model", "train"), True),
    ],
)
def test_only_on_a_gpu_the_training_stages_take_no_turns(
    tiny: Config, device: str, kinds: tuple[str, ...], turns: bool
) -> None:
    assert throughput.takes_turns({kind: Spec(kind, tiny, device, 1) for kind in kinds}) is turns


# --- 3. waiting for data


class Sleepy:
    """A loader that sleeps before each batch, and knows how long it slept."""

    def __init__(self, batch: Batch, seconds: float) -> None:
        self.batch, self.seconds, self.slept = batch, seconds, 0.0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            began = time.perf_counter()
            if self.seconds:  # even a sleep of 0 gives the core away
                time.sleep(self.seconds)
            self.slept += time.perf_counter() - began
            yield self.batch


@pytest.mark.parametrize("sleep", [0.02, 0.2])
def test_a_sleep_in_the_loader_shows_in_the_data_wait_share(tiny: Config, sleep: float) -> None:
    """Within 10% of what was really slept in the window, whatever the machine does meanwhile."""
    world = World(0, 1, CPU)
    loader = Sleepy(random_batch(tiny, open_shards(tiny.data.shards), CPU), sleep)
    stage = trained(tiny, open_shards(tiny.data.shards), world, loader, steps=10)
    inner = stage.batches
    next(inner)

    def marked() -> Iterator[Tensor]:
        yield next(inner)  # the batch before the window
        loader.slept = 0.0
        yield from inner

    stage.batches = marked()
    window = timed_window(stage, 0.5, batches=3)
    assert window.data_wait_share == pytest.approx(loader.slept / window.seconds, rel=0.1)


def test_a_loader_that_never_waits_shows_next_to_none(tiny: Config) -> None:
    world = World(0, 1, CPU)
    batch = random_batch(tiny, open_shards(tiny.data.shards), CPU)
    loader = Sleepy(batch, 0.0)
    share = timed_window(trained(tiny, open_shards(tiny.data.shards), world, loader, steps=10), 0.3).data_wait_share
    assert share is not None
    assert share < 0.05


# --- the baselines do the same work


def views(full: bool, spec: LogMel, seconds: float, **over: Any) -> Views:
    cfg = AugmentationConfig(**{**NEVER, "spec_augment": False, **over})
    return Views(cfg, spec, seconds, "same", CPU, full)


@pytest.mark.parametrize("full", [False, True])
def test_a_baselines_clean_view_is_the_graphs(small_shards: Path, tiny: Config, full: bool) -> None:
    """With every augmentation off, the two see the same log-mel of the same segments."""
    whole = load_config(base=tiny.model_dump(mode="json"), command_line={"data.view_seconds": 3.0})
    shards, spec = open_shards(small_shards), LogMel(n_mels=16, mean=-20.0, std=20.0)
    graph = create_loader(whole, shards, spec, World(0, 1, CPU), "train", "clean")
    ours = next(iter(graph))
    theirs = {row: view for view, _, row in iter(Segments(shards, views(full, spec, 3.0)))}
    for view, row in zip(ours.inputs[0], ours.segment.tolist(), strict=True):
        torch.testing.assert_close(theirs[row], view, rtol=1e-3, atol=1e-3)


def test_the_full_baseline_moves_a_tone_and_keeps_its_length() -> None:
    """Two semitones up, rounded to PITCH_STEP: 16000 / 14500 = 1.70 semitones."""
    wave = torch.from_numpy(tone(1000.0, 4.0))
    up = views(True, LogMel(), 4.0, pitch_shift_prob=1.0, pitch_shift_range=(2.0, 2.0))
    view, _ = up(wave, 16000)
    assert view.shape == (128, LogMel().frames(4.0))
    assert frequency(view.numpy()) == pytest.approx(1000 * 16000 / 14500, rel=0.01)


def test_the_full_baselines_stretch_keeps_the_pitch_and_brings_a_burst_forward() -> None:
    faster = views(True, LogMel(), 4.0, time_stretch_prob=1.0, time_stretch_range=(1.25, 1.25))
    view, _ = faster(torch.from_numpy(tone(1000.0, 4.0)), 16000)
    assert view.shape == (128, LogMel().frames(4.0))
    assert frequency(view.numpy()) == pytest.approx(1000, rel=0.01)
    wave = torch.zeros(4 * 16000)
    wave[46400:49600] = torch.from_numpy(noise(0.2))  # 0.2 s about 3 s
    view, _ = faster(wave, 16000)
    assert int(view.mean(0).argmax()) * 512 / 16000 == pytest.approx(3 / 1.25, abs=0.1)


# --- the JSON, the tables, the command


def test_the_command_measures_and_writes_the_documented_json(small_shards: Path, tmp_path: Path) -> None:
    sets = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    done = fork_server.run(
        [
            *(*forked_stages("throughput.py"), "--shards", str(small_shards), "--device", "cpu"),
            *("--stages", "loader/train", "train", "--seconds", "0.05", "--batch-size", "4", "--threads", "1"),
            *("--view-seconds", "1.5", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png"), *sets),
        ]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    doc = json.loads((tmp_path / "r.json").read_text())
    assert doc.keys() == {"environment", "stages", "ratios"}
    assert doc["stages"].keys() == {"loader/train", "train"}
    for entry in doc["stages"].values():
        assert 0 < entry["low"] <= entry["samples_per_s"] <= entry["high"]
        assert entry["windows"] == 5
        assert entry["samples"] % 4 == 0
        assert entry["decoded_over_given"] == 1
        assert entry["host_peak_bytes"] >= max(entry["host_bytes"]) > 0
    names = {"light_over_baseline", "all_over_full", "train_over_slower", "data_wait_share"}
    assert doc["ratios"].keys() == names
    assert {name for name, value in doc["ratios"].items() if value is not None} == {"data_wait_share"}
    documented = document.__doc__ or ""
    for key in {*doc["environment"], *doc["environment"]["settings"], *doc["stages"]["train"], *names}:
        assert re.search(rf"\b{key}\b", documented), key
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    rate = result_text.figure(doc["stages"]["train"]["samples_per_s"])
    assert re.search(rf"^train +{re.escape(rate)} ", done.stdout, re.MULTILINE)


def test_the_json_is_whole_after_each_group(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut loses the group that was being measured; a stage that fails loses itself."""
    monkeypatch.setattr(throughput, "open_stage", numbers_of)
    groups = (("loader/read",), ("loader/light", "loader/mel"), ("loader/all", "model"))
    plan = [{kind: Spec(kind, tiny, "cpu", 1) for kind in group} for group in groups]
    seen: list[list[str]] = []

    def keep(entries: dict[str, Any]) -> None:
        document.write(document.document(CPU, {"sweep": None}, entries), tmp_path / "r.json")
        doc = json.loads((tmp_path / "r.json").read_text())
        seen.append(list(doc["stages"]))
        assert set(doc["ratios"]) == {"light_over_baseline", "all_over_full", "train_over_slower", "data_wait_share"}
        assert doc["ratios"]["train_over_slower"] is None
        assert [path.name for path in tmp_path.iterdir()] == ["r.json"]

    _, errors = throughput.measure(plan, 1, 0.0, each=keep)
    first, second = ["loader/read"], ["loader/read", "loader/light", "loader/mel"]
    assert seen == [first, second, [*second, "model"]]
    assert [str(e) for e in errors] == ["loader/all: no such thing"]


def test_the_baselines_of_the_cpu_can_have_a_batch_of_their_own(small_shards: Path) -> None:
    options = ["--device", "cpu", "--shards", str(small_shards), "--batch-size", "8", "--baseline-batch", "2"]
    bench = throughput.Bench(throughput.build_parser().parse_args(options))
    kinds = ("loader/all", "baseline/full", "baseline/train", "baseline/gpu_full", "model")
    assert [bench.spec(kind).config.encoder.batch_size for kind in kinds] == [8, 2, 2, 8, 8]


def test_on_a_gpu_the_defaults_are_the_trainings_batch_and_all_cores(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any argument, and with the `data.threads: auto` of configs/gpu.yaml: no GPU is touched before a stage."""
    monkeypatch.setattr(throughput, "choose_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(throughput.machine, "cores", lambda: 12)
    bench = throughput.Bench(throughput.build_parser().parse_args(["--shards", str(small_shards)]))
    batch = min(128, open_shards(small_shards).count("train"))
    for kind in ("loader/all", "loader/train", "train", "baseline/gpu_full"):
        spec = bench.spec(kind)
        assert (spec.device, spec.workers) == ("gpu", 12)
        assert (spec.config.data.threads, spec.config.encoder.batch_size) == (12, batch)
    assert bench.spec("baseline/full").config.encoder.batch_size == throughput.BASELINE_BATCH
    # Those that may fill the GPU are not open side by side, and each has its entry in the JSON when it is done.
    *together, a, b, c, d = map(list, bench.plan())
    assert [a, b, c, d] == [["loader/train"], ["model"], ["train"], ["baseline/gpu_train"]]
    assert ["loader/light", "baseline/light", "baseline/gpu_light"] in together
    assert bench.about(bench.plan())["alone"] == [*a, *b, *c, *d]


def test_an_unknown_stage_is_refused_in_one_line(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--shards", str(small_shards), "--stages", "loader/fast"])
    with pytest.raises(SystemExit):
        throughput.main()
    assert capsys.readouterr().err.count("\n") == 1


def test_ratios_are_of_the_stages() -> None:
    rate = {
        "loader/light": 30,
        "baseline/light": 15,
        "loader/all": 20,
        "baseline/full": 4,
        "loader/train": 50,
        "model": 40,
    }
    entries: dict[str, dict[str, float]] = {name: {"samples_per_s": value} for name, value in rate.items()}
    entries["train"] = {"samples_per_s": 38, "data_wait_share": 0.01}
    expected = {"light_over_baseline": 2, "all_over_full": 5, "train_over_slower": 0.95, "data_wait_share": 0.01}
    assert document.ratios(entries) == pytest.approx(expected)
    assert set(document.ratios({}).values()) == {None}
    assert list(result_text.named_ratios({"ratios": document.ratios(entries)}).values()) == [
        "2.00",
        "5.00",
        "0.95",
        "1.0%",
    ]
    assert result_text.named_ratios({"ratios": document.ratios({})}) == {}


def test_the_readmes_numbers_are_the_result_files() -> None:
    """What the generator would write is what stands there."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "report.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_table_of_gpus_has_whole_runs_of_the_default_config_only() -> None:
    file = max((ROOT / "benchmarks" / "results").glob("*-nvidia-h200.json"))
    whole = json.loads(file.read_text())
    of_the_training = whole | {"stages": {name: whole["stages"][name] for name in ("model", "train")}}
    settings = whole["environment"]["settings"] | {"compile": True}
    compiled = whole | {"environment": whole["environment"] | {"settings": settings}}
    on_a_cpu = whole | {"environment": whole["environment"] | {"gpu": None}}
    others = {"part": of_the_training, "compiled": compiled, "cpu": on_a_cpu}
    table = list(gpu_report.gpu_table({"whole": whole, **others}))
    assert table == list(gpu_report.gpu_table({"whole": whole}))
    assert table[0] == "| | expected or wanted | whole |"
    (decode,) = [row for row in table if row.startswith("| `loader/decode`")]
    assert f"{whole['stages']['loader/decode']['samples_per_s']:,.0f}" in decode


def test_the_tables_hold_the_numbers_of_the_file() -> None:
    entry = summary([Window([0] * n, 1.0, None, 10**9, 2 * 10**9, 0, 0) for n in (17, 21, 1234)], 60.0)
    entry |= {"batch_size": 16, "view_seconds": 60.0, "n_mels": 128, "threads": 2, "prefetch": 2}
    doc = {
        "environment": {
            **{"cpu": "A CPU", "cores": 2, "memory_gb": 8, "gpu": None, "python": "3", "versions": {"torch": "2"}},
            **{"date": "today", "commit": "abc"},
            "settings": {
                **{"segments": 24, "segment_seconds": 60.0, "codec": "flac", "sample_rate": None, "model": "simsiam x"},
                **{"precision": "auto", "compile": False, "sweep": None, "soak": None, "device": "cpu"},
            },
        },
        "stages": {"loader/light": entry},
        "ratios": document.ratios({"loader/light": entry}),
    }
    page = "\n".join(report.section("name", doc))
    assert "| `loader/light` | 21.0 | 17.0 to 1,234 |" in page
    assert "batch 16, 60 s, 2 threads" in page
    assert "A CPU" in page
    marked = "before\n<!-- results -->\nold\n<!-- /results -->\nafter\n"
    readme = report.with_part(marked, "results", report.readme_table({"name": doc}))
    assert "| 21.0 |" in readme
    assert "old" not in readme
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "not measured" not in readme  # rows that no file has are left out
