"""The DALI graph as a torch iterator: one `for` loop is one epoch; its place is saved and restored exactly.

An epoch is one turn of the data, shared by the ranks. A shuffled loader (training) gives the whole batches in it: no
segment comes twice in an epoch, and the few that fill no batch, different ones each time, are read but not decoded. An
ordered loader (validation, embedding) gives each segment of this rank's part once; only its last batch is smaller. A
segment that no longer decodes is left out of its batch.
"""

import ctypes
import dataclasses
import gc
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simsiam_dali.data.dali import backend
from simsiam_dali.data.leave_out import build_without, damaged, reason_of
from simsiam_dali.data.pipeline import Epoch, Graph, LogMel
from simsiam_dali.data.quarantine import Quarantine
from simsiam_dali.errors import UserError

OUT_OF_MEMORY = re.compile(r"out of memory|bad_alloc|cudaErrorMemoryAllocation|allocation failed|cannot allocate", re.I)
CUDA_FAULT = re.compile(r"(CUDA|cuFFT|NPP|NVML)[^\n]*error[^\n]*", re.I)

PLACE_SECONDS = 1.0
"""How often the graph's state is kept while it runs, s: after an error, so much is decoded again at most."""

ANOTHER_GRAPH = "checkpoint might come from another pipeline"
"""Part of what DALI says to a state of a graph with other operators."""


def device_fault(error: Exception, batch_size: int, group: int = 1) -> str | None:
    """What to tell where memory or the GPU is to blame for the graph's error, and no segment; None otherwise.

    group: batches that make one step.
    """
    text = str(error)
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
        memory = "GPU" if "cuda" in text.lower() else "host"
        less = "a smaller train.micro_batch" if group > 1 else f"--batch-size {max(1, batch_size // 2)}"
        return (
            f"the data graph ran out of {memory} memory with batches of {batch_size}: use {less}, or shorter views"
            " (--set data.view_seconds=...)"
        )
    found = CUDA_FAULT.search(text)
    return f"the data graph stopped, and the GPU or its driver is to blame: {found[0].strip()}" if found else None


class Batch(NamedTuple):
    """Two augmented views of the same segments: log-mel `(B, n_mels, T)` float32; `segment (B,)` int64, their rows."""

    view1: Tensor
    view2: Tensor
    segment: Tensor


class Single(NamedTuple):
    """One clean log-mel `(B, n_mels, T)` or one waveform `(B, N)`, float32, of each segment; `segment (B,)` int64."""

    data: Tensor
    segment: Tensor


class Loader:
    """Iterates over `count` segments of a `Graph` in batches.

    count: segments in the split, over all ranks. group: a shuffled epoch holds a whole number of groups of so many
    batches, such as those whose gradients make one step. gpu: CUDA device number, None for the CPU. quarantine: where a
    segment that no longer decodes goes; the batches that it was to be in are smaller by it, everything else stays as it
    was. Raises UserError when a shuffled loader could not fill one group, when too many segments are bad, and, without
    a quarantine, at the first.
    """

    def __init__(
        self,
        graph: Graph,
        count: int,
        batch_size: int,
        threads: int,
        prefetch: int,
        seed: int,
        gpu: int | None = None,
        quarantine: Quarantine | None = None,
        group: int = 1,
    ) -> None:
        ranks, rank = graph.source.num_shards, graph.source.shard_id
        self.batch_size, self.group, self.gpu, self.quarantine = batch_size, group, gpu, quarantine
        self.shuffled = graph.source.shuffle_buffer > 0
        # DALI gives rank r the samples from count * r // ranks on, and pads every rank to the longest part.
        self.count = count * (rank + 1) // ranks - count * rank // ranks
        longest = -(-count // ranks)
        self._turn = -(-longest // batch_size)  # batches that the graph gives before it begins again
        self.steps = count // (batch_size * group * ranks) * group if self.shuffled else self._turn
        if self.steps == 0:
            each = f" on each of {ranks} processes" if ranks > 1 else ""
            raise UserError(
                f"a batch of {batch_size * group}{each} is larger than the data set ({count} segments): use"
                f" --batch-size {max(1, count // ranks)} or less, or pack more songs"
            )
        epoch = Epoch(self.steps, self._turn) if self.steps < self._turn else None
        self.graph = dataclasses.replace(graph, epoch=epoch)
        self.settings = (batch_size, threads, prefetch)
        self.decoded = 0  # segments that the graph decoded for all batches so far, of any epoch
        self.step = 0  # batches of this epoch already given
        self.left_out = set(quarantine.rows) if quarantine else set[int]()
        # Where to come back to: DALI's graph is lost with an error, and then cannot say where it was.
        self._place: str | None = None  # a state of the graph,
        self._since = 0  # batches given after it,
        self._placed = 0.0  # and when it was
        self.begin(seed)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        while self.step < self.steps:
            outputs = self._run()
            self.step += 1
            rows = outputs[-1]
            keep = torch.ones(len(rows), dtype=torch.bool)
            if not self.shuffled:
                keep[max(self.count - (self.step - 1) * self.batch_size, 0) :] = False
            keep &= ~torch.isin(rows, self._marks)
            if not keep.all():
                if self.shuffled and keep.sum() < 2:  # batch norm has no statistics of one
                    raise UserError(
                        f"of a batch of {self.batch_size} segments {int(keep.sum())} are not in {self.quarantine.path}:"  # type: ignore[union-attr]
                        " use a larger --batch-size"
                    )
                outputs = [x[keep.to(x.device)] for x in outputs]
            yield Batch(*outputs) if self.graph.mode == "views" else Single(*outputs)
        for _ in range(self._turn - self.steps):
            self._run()  # what is left of the turn, and fills no batch of every rank: read, not decoded
        self.step = 0

    def endless(self) -> Iterator[Any]:
        """Epoch after epoch."""
        while True:
            yield from self

    def _run(self) -> list[Tensor]:
        """The next batch: views or data, and rows `(B,)` on the CPU; stand-ins are still in it."""
        if time.monotonic() - self._placed > PLACE_SECONDS:
            self._remember(self.pipeline.checkpoint())
        searched = False
        while True:
            try:
                outputs, total, samples = self._outputs()
                outputs[-1] = outputs[-1].reshape(-1)
                if bool(total.isfinite().all()) and self._known(outputs[-1]):
                    self._since += 1
                    self.decoded += int((samples > 0).sum())
                    return outputs
                reason = "a segment holds values that are not finite, or a row that is not in the table"
            except (RuntimeError, MemoryError) as e:
                if fault := device_fault(e, self.batch_size, self.group):
                    raise UserError(fault) from e
                reason = reason_of(e)
            found = self._damaged() if self.quarantine else {}
            # What nobody can find may have passed, such as a network's fault: one more try.
            if not self.quarantine or (not found and searched):
                raise UserError(
                    f"the data graph stopped ({reason}): a segment of the shards may be damaged; check with"
                    " python -m simsiam_dali.pack --verify"
                )
            searched = True
            self.quarantine.add(found)
            self.left_out |= self.quarantine.rows
            batches = self._since
            self._build(self._place)
            for _ in range(batches):
                self._outputs()
            self._since = batches

    def _known(self, rows: Tensor) -> bool:
        """Whether `rows (B,)` are of segments, or mark a stand-in: others are read from damaged bytes."""
        return self.quarantine is None or bool((torch.isin(rows, self._marks) | self.quarantine.holds(rows)).all())

    def _outputs(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """What the graph gives next, the sums that tell whether it is finite, and how much was decoded."""
        stream = torch.cuda.current_stream(self.gpu) if self.gpu is not None else None
        # No copy: the dynamic executor hands its buffers over, and gets them back when torch drops the tensors.
        *data, rows, total, samples = [torch.from_dlpack(x.as_tensor()) for x in self.pipeline.run(stream)]
        if self.graph.mode != "raw":
            data = [frequency_first(x) for x in data]
        return [*data, rows], total, samples

    def _damaged(self) -> dict[int, str]:
        """The rows of the batch that failed which do not decode, with reasons."""
        assert self.quarantine is not None
        left_out = self.quarantine.by_shard(self.left_out)
        try:
            return damaged(self.graph, (*self.settings, self.seed, self.gpu), self._place, self._since, left_out)
        except RuntimeError as e:
            raise UserError(f"the data graph stopped, and the shards cannot be read ({reason_of(e)})") from e

    def _build(self, state: str | None) -> None:
        left_out = self.quarantine.by_shard(self.left_out) if self.quarantine else {}
        settings = (*self.settings, self.seed, self.gpu)
        self.pipeline, marks = build_without(self.graph, settings, state, left_out)
        self._marks = torch.tensor(sorted(marks), dtype=torch.int64)  # rows of what stands in
        self._remember(state)

    def _remember(self, place: str | None) -> None:
        self._place, self._since, self._placed = place, 0, time.monotonic()

    def begin(self, seed: int) -> None:
        """Start from the first batch, in the order and with the draws of another seed."""
        self.seed, self.step = seed, 0
        self._build(None)

    def state_dict(self) -> dict[str, Any]:
        """The reader's place and the state of every random draw, after the last batch given; and what is left out."""
        self._remember(self.pipeline.checkpoint())
        return {"step": self.step, "seed": self.seed, "pipeline": self._place, "left_out": sorted(self.left_out)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state_dict` was called: the same order, the same draws.

        Raises UserError when the state is of a graph with other operators.
        """
        self.step, self.seed = state["step"], state["seed"]
        self.left_out |= set(state["left_out"])
        try:
            self._build(state["pipeline"])
        except RuntimeError as e:
            if ANOTHER_GRAPH not in str(e):
                raise
            raise UserError(
                "cannot resume: the checkpoint was written by another version of simsiam_dali, whose data graph has"
                " other operators; finish the run with that version, or train anew"
            ) from e


def frequency_first(x: Tensor) -> Tensor:
    """`(B, T, n_mels)` to `(B, n_mels, T)`, contiguous.

    Sample by sample: torch transposes a matrix in blocks, twice as fast as a stack of them, and in a third of the time
    that DALI's operator takes on a CPU.
    """
    y = x.new_empty(x.shape[0], x.shape[2], x.shape[1])
    if x.is_cuda:
        return y.copy_(x.transpose(1, 2))
    for target, source in zip(y, x, strict=True):
        target.copy_(source.t())
    return y


def release_memory() -> None:
    """Give back what loaders that are no longer used held: graphs, DALI's pools on the GPU and in pinned memory, holes.

    DALI's pipelines are reference cycles: left to Python's own rhythm, those of some 25 epochs wait in memory. glibc
    keeps the holes they leave, more of them every epoch (docs/reliability.md).
    """
    gc.collect()
    backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]
    ctypes.CDLL(None).malloc_trim(0)


def measure_log_mel(loader: Loader, segments: int) -> LogMel:
    """Mean and std of the log-mel, in dB, over the first `segments` of an ordered clean loader.

    The loader's graph must have mean 0 and std 1. Shards are shuffled when packed, so the first segments are a sample.
    """
    total = torch.zeros(3, dtype=torch.float64)
    for batch in loader:
        x = batch.data.double()
        total += torch.stack([torch.tensor(float(x.numel())), x.sum().cpu(), x.square().sum().cpu()])
        if loader.step * loader.batch_size >= segments:
            break
    number, first, second = total.tolist()
    mean = first / number
    std = max((second / number - mean**2), 0.0) ** 0.5
    return dataclasses.replace(loader.graph.log_mel, mean=mean, std=max(std, 1e-3))
