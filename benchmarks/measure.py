"""Timing. Each stage lives in a process of its own, and is frozen between its windows.

Stages that are compared take turns, window by window, so that other load on the machine affects all of them. A stage
that waited for its turn would fill its queues meanwhile: it would take the cores from the stage that is being timed,
and start its own next window with free batches. So its process is stopped (SIGSTOP) at the end of its window, and
continued for the next.

A window starts and ends when a batch arrives. What it counts are the segment ids of the batches that arrived in it.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from machine import gpu_bytes_in_use, host_bytes, host_peak_bytes
from torch import Tensor

from simsiam_dali.common.errors import UserError
from simsiam_dali.training.memory import out_of_memory_as_one_error
from simsiam_dali.training.throughput import StepClock

WARM_UP_UNITS = 2
"""Least units of batches before the first window; it lasts a window's seconds in any case."""

SECONDS_TO_END = 5

_CONTEXT = multiprocessing.get_context("spawn")  # not fork: DALI, CUDA and OpenMP have threads


@dataclass
class Stage:
    """What is timed.

    batches: without end, the segment ids `(B,)` of each batch once its work is done, or queued on the device.
    unit: batches after which the work repeats. The workers of a DataLoader give a batch each in turn, so a window
    holds whole turns. bytes_to_device: copied to the GPU for each sample. gpu_bytes: GPU memory that this stage took so
    far, for torch's and DALI's pools, which do not shrink. clock: of a stage that trains, the trainer's. decoded: of a
    loader, how many segments it has decoded so far.
    """

    batches: Iterator[Tensor]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    unit: int = 1
    bytes_to_device: int = 0
    gpu_bytes: int = 0
    clock: StepClock | None = None
    decoded: Callable[[], int] | None = None

    def synchronize(self) -> None:
        """Wait for what is queued on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Window:
    """One timed stretch: `segments` are the ids that came in `seconds`; memory as it was at its end, in bytes."""

    segments: list[int]
    seconds: float
    data_wait_share: float | None  # where the stage trains
    host_bytes: int
    host_peak_bytes: int  # since the stage's process began
    gpu_bytes: int
    bytes_to_device: int  # for each sample
    decoded: int | None = None  # segments; of a loader

    @property
    def samples_per_s(self) -> float:
        """Segments a second."""
        return len(self.segments) / self.seconds


def timed_window(stage: Stage, seconds: float, batches: int = 1) -> Window:
    """Time whole units of batches, for at least `seconds` and at least `batches`.

    One batch goes before, untimed: it was in the making when the stage stood still.
    """
    gpu_before = gpu_bytes_in_use(stage.device)
    next(stage.batches)
    stage.synchronize()
    if stage.clock:
        stage.clock.reset()
    decoded = stage.decoded() if stage.decoded else 0
    began = time.perf_counter()
    came: list[Tensor] = []
    while len(came) < batches or time.perf_counter() - began < seconds:
        came += [next(stage.batches) for _ in range(stage.unit)]
    waited = stage.clock.read()[1] if stage.clock else None
    stage.synchronize()
    took = time.perf_counter() - began
    # All others are frozen, so what the device has lent out since is this stage's.
    stage.gpu_bytes += gpu_bytes_in_use(stage.device) - gpu_before
    host = host_bytes()
    return Window(
        segments=torch.cat(came).tolist(),
        seconds=took,
        data_wait_share=waited,
        host_bytes=host,
        host_peak_bytes=max(host, host_peak_bytes()),  # the kernel brings its peak up to date now and then only
        gpu_bytes=stage.gpu_bytes,
        bytes_to_device=stage.bytes_to_device,
        decoded=stage.decoded() - decoded if stage.decoded else None,
    )


def _serve(pipe: Connection, open_stage: Callable[..., Stage], arguments: tuple[Any, ...], seconds: float) -> None:
    """A stage's process: when asked, opens it and warms it up; then answers each request with a window."""
    # A group of its own, so that a DataLoader's workers are frozen along. The kernel wakes and ends a frozen group
    # whose parent has died.
    os.setpgid(0, 0)
    with contextlib.suppress(EOFError, ConnectionError):  # asked to end, or the parent died
        try:
            pipe.recv()
            with out_of_memory_as_one_error():
                stage = open_stage(*arguments)
                timed_window(stage, seconds, batches=WARM_UP_UNITS * stage.unit)
                pipe.send(None)
                while True:
                    pipe.send(timed_window(stage, *pipe.recv()))
        except (UserError, torch.OutOfMemoryError) as e:
            pipe.send(UserError(str(e).splitlines()[0]))


class FrozenStage:
    """A stage in a process of its own, frozen except during its windows.

    open_stage: a module's function, called with `arguments` in the new process. warm_up: seconds. The process starts at
    once, since loading its libraries takes it some seconds; the stage is there after `open`.
    """

    def __init__(self, name: str, open_stage: Callable[..., Stage], arguments: tuple[Any, ...], warm_up: float) -> None:
        self.name = name
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs, open_stage, arguments, warm_up), name=name)
        self.process.start()
        theirs.close()

    def open(self) -> None:
        """Open the stage and warm it up. Raises UserError when that fails."""
        self._ask(None)
        self._signal(signal.SIGSTOP)

    def window(self, seconds: float, batches: int = 1) -> Window:
        """Go on from where the last window ended."""
        self._signal(signal.SIGCONT)
        window = self._ask((seconds, batches))
        self._signal(signal.SIGSTOP)
        assert isinstance(window, Window)
        return window

    def dismiss(self) -> None:
        """Ask the process to end, so that it gives back what it holds."""
        self.pipe.close()
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process and its workers, by force if asking does not help."""
        self.dismiss()
        self.process.join(timeout=SECONDS_TO_END)
        self._signal(signal.SIGKILL)
        self.process.kill()
        self.process.join()

    def _signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has no group yet, or is gone
            os.killpg(self.process.pid, number)

    def _ask(self, request: tuple[float, int] | None) -> Window | None:
        try:
            self.pipe.send(request)
            answer = self.pipe.recv()
        except (EOFError, OSError):  # a pipe breaks or is reset, or ends in the middle of an answer
            raise UserError(f"{self.name} died (its own message, if any, is above)") from None
        if isinstance(answer, UserError):
            raise UserError(f"{self.name}: {answer}")
        return answer


def interleaved(
    stages: Mapping[str, tuple[Callable[..., Stage], tuple[Any, ...]]],
    windows: int,
    seconds: float,
    batches: int = 1,
    say: Callable[[str], None] = print,
    together: bool = True,
) -> tuple[dict[str, list[Window]], list[UserError]]:
    """Time stages in turns: one window of each, then the next of each. Returns also why a stage could not be opened.

    together: False where they do not fit into memory at once: each is opened, timed and ended before the next is.
    """
    result: dict[str, list[Window]] = {}
    errors: list[UserError] = []
    started: list[FrozenStage] = []
    try:
        for name, how in stages.items():
            started.append(FrozenStage(name, *how, warm_up=seconds))
        for group in [started] if together else [[stage] for stage in started]:
            opened = _opened(group, errors, say)
            result |= {stage.name: [] for stage in opened}
            for turn in range(windows if opened else 0):
                say(f"window {turn + 1} of {windows}: {', '.join(stage.name for stage in opened)}")
                for stage in opened:
                    result[stage.name].append(stage.window(seconds, batches))
            if not together:
                started.remove(group[0])
                group[0].close()
    finally:
        for stage in started:
            stage.dismiss()
        for stage in started:
            stage.close()
    return result, errors


def _opened(stages: Sequence[FrozenStage], errors: list[UserError], say: Callable[[str], None]) -> list[FrozenStage]:
    """Those that could be opened; why others could not is added to `errors`."""
    opened = []
    for stage in stages:  # one after another: what one opens is its own GPU memory
        say(f"{stage.name}: warming up")
        try:
            stage.open()
            opened.append(stage)
        except UserError as e:
            errors.append(e)
    return opened


def summary(windows: Sequence[Window], view_seconds: float) -> dict[str, Any]:
    """A stage's entry in the JSON: median, lowest and highest window, and the memory it took.

    view_seconds: what one sample counts as audio; each of its two views is that long.
    """
    rates = [w.samples_per_s for w in windows]
    waits = [w.data_wait_share for w in windows if w.data_wait_share is not None]
    samples, decoded = sum(len(w.segments) for w in windows), [w.decoded for w in windows if w.decoded is not None]
    return {
        "samples_per_s": median(rates),
        "low": min(rates),
        "high": max(rates),
        "audio_hours_per_s": median(rates) * view_seconds / 3600,
        "x_realtime": median(rates) * view_seconds,
        "windows": len(windows),
        "samples": samples,
        "seconds": sum(w.seconds for w in windows),
        "host_peak_bytes": windows[-1].host_peak_bytes,
        "host_bytes": [w.host_bytes for w in windows],
        "gpu_bytes": windows[-1].gpu_bytes,
        "bytes_to_device": windows[-1].bytes_to_device,
        **({"data_wait_share": median(waits)} if waits else {}),
        **({"decoded_over_given": sum(decoded) / samples} if decoded else {}),
    }
