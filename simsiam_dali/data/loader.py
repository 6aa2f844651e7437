"""The DALI graph as a torch iterator: one `for` loop is one epoch; its place is saved and restored exactly.

A shuffled loader (training) reads on without end: an epoch is the whole batches in it, and what is left over comes
first in the next, so that each segment is seen once before any is seen twice. An ordered loader (validation,
embedding) gives each segment of this rank's part once; only its last batch is smaller.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simsiam_dali.data.pipeline import Graph, LogMel, Pipeline, build
from simsiam_dali.errors import UserError


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

    count: segments in the split, over all ranks. gpu: CUDA device number, None for the CPU. Raises UserError when a
    shuffled loader could not fill one batch.
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
    ) -> None:
        ranks, rank = graph.source.num_shards, graph.source.shard_id
        self.graph, self.batch_size, self.gpu = graph, batch_size, gpu
        self.shuffled = graph.source.shuffle_buffer > 0
        # DALI gives rank r the samples from count * r // ranks on, and pads every rank to the longest part.
        self.count = count * (rank + 1) // ranks - count * rank // ranks
        padded = -(-count // ranks)
        self.steps = count // (batch_size * ranks) if self.shuffled else -(-padded // batch_size)
        if self.steps == 0:
            each = f" on each of {ranks} processes" if ranks > 1 else ""
            raise UserError(
                f"a batch of {batch_size}{each} is larger than the data set ({count} segments): use --batch-size"
                f" {max(1, count // ranks)} or less, or pack more songs"
            )
        self.settings = (batch_size, threads, prefetch)
        self.pipeline: Pipeline
        self.step = 0  # batches of this epoch already given
        self.begin(seed)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        while self.step < self.steps:
            outputs = self._run()
            self.step += 1
            if not self.shuffled:
                left = self.count - (self.step - 1) * self.batch_size
                outputs = [x[: max(left, 0)] for x in outputs] if left < self.batch_size else outputs
            outputs[-1] = outputs[-1].reshape(-1)
            yield Batch(*outputs) if self.graph.mode == "views" else Single(*outputs)
        self.step = 0

    def endless(self) -> Iterator[Any]:
        """Epoch after epoch."""
        while True:
            yield from self

    def _run(self) -> list[Tensor]:
        stream = torch.cuda.current_stream(self.gpu) if self.gpu is not None else None
        try:
            # No copy: the dynamic executor hands its buffers over, and gets them back when torch drops the tensors.
            return [torch.from_dlpack(x.as_tensor()) for x in self.pipeline.run(stream)]
        except RuntimeError as e:
            # DALI tells where in the graph, then "encountered:", then what; a decoding error names tar and segment.
            reason = str(e).rpartition("encountered:")[2].strip().partition("\n")[0]
            raise UserError(
                f"the data graph stopped ({reason}): a segment of the shards may be damaged; check with"
                " tools/make_shards.py --verify"
            ) from e

    def begin(self, seed: int) -> None:
        """Start from the first batch, in the order and with the draws of another seed."""
        self.seed, self.step = seed, 0
        self.pipeline = build(self.graph, *self.settings, seed, self.gpu, state=None)

    def state_dict(self) -> dict[str, Any]:
        """The reader's place and the state of every random draw, after the last batch given."""
        return {"step": self.step, "seed": self.seed, "pipeline": self.pipeline.checkpoint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which `state_dict` was called: the same order, the same draws."""
        self.step, self.seed = state["step"], state.get("seed", self.seed)
        self.pipeline = build(self.graph, *self.settings, self.seed, self.gpu, state=state["pipeline"])


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
