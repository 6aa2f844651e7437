"""How much memory a training step needs, estimated before the first batch.

The activations that the backward pass keeps are counted exactly, on meta tensors: no memory and no arithmetic.
Workspaces and the allocator's rounding are a measured share on top, so the result is an estimate and `HEADROOM` is kept
free.
"""

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from simsiam_dali.common.errors import UserError
from simsiam_dali.data.graph import LogMel

HEADROOM = 0.1
"""Share of the free memory that is kept free."""

BYTES_PER_PARAMETER = {"sgd": 12, "adamw": 16}
"""fp32 weight, gradient, and the optimizer's state: SGD's momentum, or AdamW's two moments."""

WORKING_SHARE = 1.4
"""On a CPU, peak memory over kept activations: gradients in flight and workspaces (1.33 to 1.43, ResNet-18)."""

GPU_SHARES = (1.04, 1.15)
"""The same on a GPU, for the memory that torch has allocated at the peak, and for all that its allocator has reserved.

Between the two there is only a warning: where memory runs out, the allocator first releases what it has cached. 1.03 to
1.04 and 1.13 to 1.14 were measured: ResNet-50 in bf16, batches of 32 to 128, an H200 (`benchmarks/gpu_step.py`).
"""

SAMPLE_BYTES, STFT_BYTES = 8e6 / (60 * 16000), (69e6 / (1876 * 1025), 83e6 / (1876 * 1025))
"""DALI's buffers on a GPU for each sample of a segment in a batch, and for each value of its views' STFTs.

Measured on an H200 with 128 segments of 60 s at 16 kHz, two batches ahead: 1.0 GB of decoded segments
(`loader/resample` of `benchmarks/throughput.py`), and with two views, 1,876 frames of 1,025 values each, 18.7 GB
(`loader/train`) to 22.2 GB (`loader/light`).
"""

RUNTIME_BYTES = 1 << 30
"""The process itself: torch's and DALI's libraries, CUDA context or thread stacks."""


OUT_OF_MEMORY = re.compile(r"CUDA error: out of memory|STATUS_ALLOC_FAILED|unable to find an engine to execute", re.I)
"""What libraries below torch say, in a RuntimeError, where memory ran out; cuDNN, that none of its algorithms ran."""


@contextmanager
def out_of_memory_as_one_error() -> Iterator[None]:
    """Raise torch.OutOfMemoryError for every error that says that memory ran out."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:
        if OUT_OF_MEMORY.search(str(e)):
            raise torch.OutOfMemoryError(str(e)) from e
        raise


@contextmanager
def refuse_out_of_memory(advice: str, where: str = "") -> Iterator[None]:
    """Raise UserError, which ends with the advice, where memory runs out."""
    try:
        with out_of_memory_as_one_error():
            yield
    except torch.OutOfMemoryError as e:
        raise UserError(f"out of memory{where}: {advice}") from e


def activation_bytes(encoder: nn.Module, shapes: list[tuple[int, ...]]) -> float:
    """Bytes per segment that the backward pass keeps, in fp32. shapes: the forward's inputs, of one segment."""
    batch = 2
    shadow = copy.deepcopy(encoder).to("meta").train()
    kept: dict[int, int] = {}
    owned = {t.untyped_storage()._cdata for t in [*shadow.parameters(), *shadow.buffers()]}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    inputs = [torch.empty(batch, *shape, device="meta") for shape in shapes]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = shadow(*inputs)
    del outputs
    return sum(kept.values()) / batch


def dali_bytes(samples: float, seconds_of_views: float, spec: LogMel) -> tuple[float, float]:
    """The least and the most that DALI's buffers take on a GPU for a segment of a batch.

    samples: of the segment, at the rate it is packed at. seconds_of_views: of all its views together; 0 for raw audio.
    """
    stft_values = seconds_of_views * spec.sample_rate / spec.hop_length * (1 + spec.n_fft // 2)
    least, most = (samples * SAMPLE_BYTES + stft_values * each for each in STFT_BYTES)
    return least, most


CGROUP, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_bytes(device: torch.device) -> int:
    """Free memory of `device`: a GPU's own, or the host's within its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(info["MemAvailable"].split()[0]) * 1024  # from kB
    return int(min([available, *map(_free_of_group, _control_groups())]))


def _control_groups() -> list[Path]:
    """The folders of this process's control group (version 2) and of those around it: the limits of all hold."""
    lines = OWN_CGROUP.read_text().splitlines() if OWN_CGROUP.exists() else []
    own = [Path(line.removeprefix("0::/")) for line in lines if line.startswith("0::/")]
    return [CGROUP / group for path in own for group in (path, *path.parents)]


def _free_of_group(folder: Path) -> float:
    """Free memory of a control group in bytes, infinite where it has no limit."""
    try:
        limit, used, stat = ((folder / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
    except OSError:  # the outermost one, or one that this process cannot see
        return math.inf
    held = dict(line.split() for line in stat.splitlines())
    cache = int(held["inactive_file"]) + int(held["active_file"])  # of files that were read: counts as used, gives way
    return int(limit) - int(used) + cache if limit.strip().isdigit() else math.inf


def check_fits(
    encoder: nn.Module,
    batch: int,
    shapes: list[tuple[int, ...]],
    half: bool,
    device: torch.device,
    dali: tuple[float, float],
    optimizer: str = "sgd",
) -> str | None:
    """A warning where `batch` segments may not fit by the estimate, None where they do.

    Raises UserError, with the largest batch that fits, where they do not. shapes: the forward's inputs, of one segment.
    half: activations are kept in 16 bits (autocast). dali: `dali_bytes`, which count on a GPU only.
    """
    kept = activation_bytes(encoder, shapes) * (0.5 if half else 1.0)
    shares, buffers = (GPU_SHARES, dali) if device.type == "cuda" else ((WORKING_SHARE,) * 2, (0.0, 0.0))
    least, most = (share * kept + buffer for share, buffer in zip(shares, buffers, strict=True))  # per segment
    static = RUNTIME_BYTES + BYTES_PER_PARAMETER[optimizer] * sum(p.numel() for p in encoder.parameters())
    free = free_bytes(device) * (1 - HEADROOM)
    if static + batch * most <= free:
        return None
    largest = int((free - static) // most)
    low, high = ((static + batch * each) / 1e9 for each in (least, most))
    available = f"GB on {device.type} (estimate), and {free / 1e9:.1f} GB are available"
    if static + batch * least <= free:
        return (
            f"warning: a batch of {batch} needs {low:.1f} to {high:.1f} {available}: if memory runs out,"
            f" use --batch-size {max(2, largest)}"
        )
    advice = f"use --batch-size {largest} or less" if largest >= 2 else "not even 2 fit: use a smaller backbone"
    raise UserError(
        f"a batch of {batch} needs about {low:.1f} {available}: {advice}, or shorter views (data.view_seconds)"
    )
