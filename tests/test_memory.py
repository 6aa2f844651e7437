"""The estimate of a training step's memory: refused, warned of, or let through."""

import re
from pathlib import Path

import pytest
import torch

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.data.graph import LogMel
from simsiam_dali.models.encoder import Encoder
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training import memory
from simsiam_dali.training.data import log_mel_settings

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MINUTE = 60 * 16000  # samples
NONE, VIEWS = (0.0, 0.0), memory.dali_bytes(MINUTE, 120.0, LogMel())


def limit(group: Path, most: str) -> None:
    """A control group that holds 900 kB, of which 700 kB are of files that were read."""
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 100000\ninactive_file 500000\nactive_file 200000\n")


@pytest.mark.parametrize("own", ["", "job", "jobs.slice/job 1"])
def test_files_that_were_read_are_free_memory_of_a_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    groups, own_group = tmp_path / "groups", tmp_path / "own"
    own_group.write_text(f"3:cpuset:/elsewhere\n0::/{own}\n")
    monkeypatch.setattr(memory, "CGROUP", groups)
    monkeypatch.setattr(memory, "OWN_CGROUP", own_group)
    whole = memory.free_bytes(CPU)
    limit(groups / own, "1000000")
    assert memory.free_bytes(CPU) == 800_000
    limit(groups / own, "max")
    assert memory.free_bytes(CPU) == pytest.approx(whole, rel=0.2)


def test_the_limits_of_the_groups_around_a_control_group_hold_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, own_group = tmp_path / "groups", tmp_path / "own"
    own_group.write_text("0::/jobs/mine\n")
    monkeypatch.setattr(memory, "CGROUP", groups)
    monkeypatch.setattr(memory, "OWN_CGROUP", own_group)
    limit(groups / "jobs/mine", "max")
    limit(groups / "jobs/theirs", "950000")
    limit(groups / "jobs", "2000000")
    assert memory.free_bytes(CPU) == 1_800_000
    limit(groups / "jobs/mine", "1000000")
    assert memory.free_bytes(CPU) == 800_000


def test_refused_a_batch_that_memory_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_type(load_config(assignments=["encoder.simsiam.backbone=resnet18"])).create()
    monkeypatch.setattr(memory, "free_bytes", lambda _: 4 << 30)
    shapes: list[tuple[int, ...]] = [(128, 1876)] * 2
    with pytest.raises(UserError, match=r"a batch of 512 needs about .* use --batch-size \d+ or less") as e:
        memory.check_fits(encoder, 512, shapes, False, CPU, NONE)
    largest = int(str(e.value).split("--batch-size ")[1].split()[0])
    assert memory.check_fits(encoder, largest, shapes, False, CPU, NONE) is None
    with pytest.raises(UserError):
        memory.check_fits(encoder, largest + 1, shapes, False, CPU, NONE)
    memory.check_fits(encoder, 2 * largest, shapes, True, CPU, NONE)  # half the memory


@pytest.fixture(scope="module")
def gpu_settings() -> tuple[Encoder, list[tuple[int, ...]]]:
    """The encoder of configs/gpu.yaml, on meta tensors, and its inputs' shapes for a view of 60 s."""
    settings = load_config(Path(__file__).parents[1] / "configs" / "gpu.yaml")
    with torch.device("meta"):
        encoder = encoder_type(settings).create(pretrained=False)
    return encoder, encoder_type(settings).input_shapes(log_mel_settings(settings), 60.0)


@pytest.mark.parametrize(("gigabytes", "outcome"), [(150, "fits"), (84, "warned"), (60, "refused")])
def test_a_gpu_on_which_it_may_fit_is_not_refused(
    gpu_settings: tuple[Encoder, list[tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch, gigabytes: int, outcome: str
) -> None:
    """ResNet-50 with two views of 60 s in bf16, 128 a batch, on what an H200, a card of 80 GB and less have free.

    On an H200 the training took 77.6 GB beside the CUDA context (`train` of benchmarks/results/*-nvidia-h200.json).
    """
    encoder, shapes = gpu_settings
    monkeypatch.setattr(memory, "free_bytes", lambda _: gigabytes * 10**9)
    if outcome == "refused":
        with pytest.raises(UserError, match=r"needs about 74\.\d GB on cuda .* use --batch-size \d+ or less"):
            memory.check_fits(encoder, 128, shapes, True, GPU, VIEWS)
        return
    said = memory.check_fits(encoder, 128, shapes, True, GPU, VIEWS)
    if outcome == "fits":
        assert said is None
        return
    assert said is not None
    found = re.match(r"warning: a batch of 128 needs 74\.\d to 84\.\d GB .* use --batch-size (\d+)$", said)
    assert found
    assert memory.check_fits(encoder, int(found[1]), shapes, True, GPU, VIEWS) is None
    assert memory.check_fits(encoder, int(found[1]) + 1, shapes, True, GPU, VIEWS) is not None


def test_dali_s_buffers_count_on_a_gpu(
    gpu_settings: tuple[Encoder, list[tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, shapes = gpu_settings
    monkeypatch.setattr(memory, "free_bytes", lambda _: 80 * 10**9)
    needed = []
    for dali in (NONE, VIEWS):
        with pytest.raises(UserError) as e:
            memory.check_fits(encoder, 1000, shapes, True, GPU, dali)
        needed.append(float(str(e.value).split("about ")[1].split()[0]))
    assert needed[1] - needed[0] == pytest.approx(146.0, abs=0.2)  # GB, for 1000 segments


def test_dali_s_buffers_are_those_of_the_views_most_of_all() -> None:
    """What an H200 had for 128 segments of 60 s and two views, in proportion to what the graph makes of a segment."""
    assert [128 * each / 1e9 for each in VIEWS] == pytest.approx([18.7, 22.2], abs=0.1)
    assert [128 * each / 1e9 for each in memory.dali_bytes(MINUTE, 0.0, LogMel())] == pytest.approx([1.0, 1.0], abs=0.1)
    short, long, four = (memory.dali_bytes(MINUTE, each, LogMel())[0] for each in (12.0, 120.0, 240.0))
    assert long / short > 5
    assert four / long == pytest.approx(1.95, abs=0.01)


def test_dali_s_buffers_grow_with_the_rates_and_the_stft() -> None:
    """At 44.1 kHz a minute has 2.8 times the samples, and with the same hop as many times the frames."""
    least, most = memory.dali_bytes(60 * 44100, 120.0, LogMel(sample_rate=44100))
    assert (least / VIEWS[0], most / VIEWS[1]) == pytest.approx((44.1 / 16, 44.1 / 16), rel=1e-6)
    coarse, _ = memory.dali_bytes(MINUTE, 120.0, LogMel(hop_length=1024, n_fft=1024))
    alone, _ = memory.dali_bytes(MINUTE, 0.0, LogMel())
    assert (coarse - alone) / (VIEWS[0] - alone) == pytest.approx(0.25, abs=0.001)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
)
def test_where_memory_runs_out_one_line_says_what_to_do(error: Exception) -> None:
    with pytest.raises(UserError) as refused, memory.refuse_out_of_memory("use less", " on cuda:0"):
        raise error
    assert str(refused.value) == "out of memory on cuda:0: use less"
    with pytest.raises(RuntimeError, match="another"), memory.refuse_out_of_memory("use less"):
        raise RuntimeError("another")


def test_adamw_keeps_a_moment_more_than_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = torch.nn.Linear(1000, 1000)
    needs = 2 * memory.activation_bytes(encoder, [(1000,)]) * memory.WORKING_SHARE + memory.RUNTIME_BYTES
    free = {
        name: (needs + each * 1_001_000) / (1 - memory.HEADROOM) for name, each in memory.BYTES_PER_PARAMETER.items()
    }
    assert free["adamw"] - free["sgd"] == pytest.approx(4 * 1_001_000 / (1 - memory.HEADROOM))
    for name, bytes_free in free.items():
        monkeypatch.setattr(memory, "free_bytes", lambda _, n=bytes_free: n + 1)
        memory.check_fits(encoder, 2, [(1000,)], False, CPU, NONE, name)
        monkeypatch.setattr(memory, "free_bytes", lambda _, n=bytes_free: n - 4096)
        with pytest.raises(UserError, match="not even 2 fit"):
            memory.check_fits(encoder, 2, [(1000,)], False, CPU, NONE, name)
