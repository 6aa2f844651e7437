"""The DALI graph as a torch iterator: one `for` loop is one epoch; its state is saved and restored exactly.

An epoch is one pass over the data, shared by the ranks. A shuffled loader (training) yields its full batches only: no
segment comes twice in an epoch, and the few that fill no batch, different ones each time, are read but not decoded. An
ordered loader (validation, embedding) yields each segment of this rank's part once; only its last batch is smaller. A
segment that no longer decodes is dropped from its batch.
"""

import ctypes
import dataclasses
import gc
import re
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simsiam_dali.common.errors import UserError
from simsiam_dali.data.dali import backend
from simsiam_dali.data.graph import Epoch, GraphConfig, LogMel
from simsiam_dali.data.pipeline import PipelineSettings, build
from simsiam_dali.data.quarantine import Quarantine
from simsiam_dali.data.skip_damaged import find_undecodable, reason_of, with_placeholders

OUT_OF_MEMORY = re.compile(
    r"out of memory|bad_alloc|cudaErrorMemoryAllocation|allocation failed|can(no|')t allocate", re.I
)
ON_GPU = re.compile(r"cuda|on device", re.I)
READER, DECODER = "fn.readers.webdataset", "fn.decoders.audio"
CUDA_FAULT = re.compile(r"(CUDA|cuFFT|NPP|NVML)[^\n]*error[^\n]*", re.I)

SNAPSHOT_SECONDS = 1.0
"""Interval between snapshots of the graph's state, s: after an error, at most this much is decoded again."""


def device_fault(error: Exception, batch_size: int, group: int = 1) -> str | None:
    """The message if memory or the GPU, not a segment, caused the graph's error; None otherwise.

    group: batches that make one step.
    """
    text = str(error)
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
        memory = "GPU" if ON_GPU.search(text) else "host"
        less = "a smaller train.micro_batch" if group > 1 else f"--batch-size {max(2, batch_size // 2)}"
        return (
            f"the data graph ran out of {memory} memory with batches of {batch_size}: use {less}, or shorter views"
            " (data.view_seconds; of embed, --view-seconds)"
        )
    found = CUDA_FAULT.search(text)
    return f"the data graph stopped, and the GPU or its driver is to blame: {found[0].strip()}" if found else None


class Batch(NamedTuple):
    """What an encoder takes of some segments, and their rows in the segment table, `segment (B,)` int64 on the CPU.

    inputs, float32: the augmented views, log-mel `(B, n_mels, T)` each; or one clean log-mel, or one waveform `(B, N)`.
    """

    inputs: tuple[Tensor, ...]
    segment: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The inputs on `device`; rows stay where they are."""
        return self._replace(inputs=tuple(x.to(device) for x in self.inputs))


class Loader:
    """Iterates over `count` segments of a `GraphConfig` in batches.

    count: segments in the split, over all ranks. group: a shuffled epoch is a whole number of groups of so many
    batches, such as those whose gradients make one step. gpu: CUDA device number, None for the CPU. quarantine: where
    segments that no longer decode are recorded; they are dropped from their batches, and everything else is unchanged.
    Raises UserError if a shuffled loader cannot fill one group, and if too many segments are damaged.
    """

    def __init__(
        self,
        graph: GraphConfig,
        count: int,
        batch_size: int,
        threads: int,
        prefetch: int,
        seed: int,
        quarantine: Quarantine,
        gpu: int | None = None,
        group: int = 1,
    ) -> None:
        ranks, rank = graph.source.num_shards, graph.source.shard_id
        self.batch_size, self.group, self.gpu, self.quarantine = batch_size, group, gpu, quarantine
        self.shuffled = graph.source.shuffle_buffer > 0
        # DALI's part for rank r begins at count * r // ranks; every rank is padded to the longest part.
        self.count = count * (rank + 1) // ranks - count * rank // ranks
        longest = -(-count // ranks)
        self._reader_batches = -(-longest // batch_size)  # in one pass of the reader
        self.steps = count // (batch_size * group * ranks) * group if self.shuffled else self._reader_batches
        if not self.shuffled and count < ranks:
            raise UserError(
                f"{count} segments cannot be shared by {ranks} processes: use {count} processes or fewer, or pack more"
                " songs"
            )
        if self.steps == 0:
            each = f" on each of {ranks} processes" if ranks > 1 else ""
            fits = f"use --batch-size {count // ranks} or less, or pack" if count >= 2 * ranks else "pack"
            raise UserError(
                f"a batch of {batch_size * group}{each} is larger than the data set ({count} segments):"
                f" {fits} more songs"
            )
        epoch = Epoch(self.steps, self._reader_batches) if self.steps < self._reader_batches else None
        self.graph = dataclasses.replace(graph, epoch=epoch)
        self._settings = PipelineSettings(batch_size, threads, prefetch, seed, gpu)
        self.decoded = 0  # segments that the graph decoded for all batches so far, of any epoch
        self.step = 0  # batches of this epoch already yielded
        self._batches_since_snapshot, self._snapshot_time = 0, 0.0
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
            keep &= ~torch.isin(rows, self._placeholder_rows)
            if self.shuffled and not keep.all() and keep.sum() < 2:  # batch norm has no statistics of one
                if self.group == 1:
                    raise UserError(
                        f"of a batch of {self.batch_size} segments {int(keep.sum())} are not in {self.quarantine.path}:"
                        " use a larger --batch-size"
                    )
                keep[:] = True  # placeholders are views of other segments; losses by micro-batch read no rows
            if not keep.all():
                outputs = [x[keep.to(x.device)] for x in outputs]
            yield Batch(tuple(outputs[:-1]), outputs[-1])
        for _ in range(self._reader_batches - self.steps):
            self._run()  # the rest of the reader's pass, which fills no group: read, not decoded
        self.step = 0

    def endless(self) -> Iterator[Any]:
        """Epoch after epoch."""
        while True:
            yield from self

    def _run(self) -> list[Tensor]:
        """The next batch: views or data, and rows `(B,)` on the CPU; placeholders are still in it."""
        if time.monotonic() - self._snapshot_time > SNAPSHOT_SECONDS:
            self._set_snapshot(self.pipeline.checkpoint())
        searched = freed = restart = False
        while True:
            out_of_memory, suspect, fault = False, False, None
            try:
                if restart:
                    self._restart()
                outputs, total, samples = self._outputs()
                known = torch.isin(outputs[-1], self._placeholder_rows) | self.quarantine.holds(outputs[-1])
                if total.isfinite().all() and known.all():
                    self._batches_since_snapshot += 1
                    self.decoded += int((samples > 0).sum())
                    return outputs
                reason = "a segment holds values that are not finite, or a row that is not in the table"
            except (RuntimeError, MemoryError) as e:
                reason, out_of_memory = reason_of(e), bool(OUT_OF_MEMORY.search(str(e)))
                # A damaged header may state any length, and the decoder wants memory for all of it.
                suspect = out_of_memory and DECODER in str(e) and not searched
                fault = device_fault(e, self.batch_size, self.group)
                if fault and not suspect and (freed or self.gpu is None or not out_of_memory):
                    raise UserError(fault) from e
            restart = True
            if out_of_memory and not suspect:  # on a GPU: once more, with what torch had cached
                freed = True
                self._drop_pipeline()
                continue
            found = self._find_undecodable(fault if suspect else None)
            # An error without a damaged segment may pass, such as one of the network: try once more.
            if not found and searched:
                raise UserError(
                    f"the data graph stopped ({reason}): a segment of the shards may be damaged; check with"
                    " python -m simsiam_dali.pack --verify"
                )
            searched = True
            self.quarantine.add(found)

    def _restart(self) -> None:
        """Build the graph again, and go on to where it stopped."""
        batches = self._batches_since_snapshot
        try:
            self._build(self._snapshot)
            for _ in range(batches):
                self._outputs()
        finally:
            self._batches_since_snapshot = batches

    def _outputs(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """The graph's next outputs: data and rows, the totals that are finite if the data is, and decoded lengths."""
        stream = torch.cuda.current_stream(self.gpu) if self.gpu is not None else None
        # No copy: the dynamic executor hands over its buffers, and reuses them when torch frees the tensors.
        *data, rows, total, samples = [torch.from_dlpack(x.as_tensor()) for x in self.pipeline.run(stream)]
        if self.graph.mode != "raw":
            data = [x.transpose(1, 2).contiguous() for x in data]  # a third of the time of DALI's operator on a CPU
        return [*data, rows.reshape(-1)], total, samples

    def _find_undecodable(self, fault: str | None) -> dict[int, str]:
        """The rows of the failed batch which do not decode, with reasons. fault: reported where the search fails."""
        skipped = self.quarantine.by_shard()
        self._drop_pipeline()  # it cannot run on, and the search needs its memory
        try:
            return find_undecodable(self.graph, self._settings, self._snapshot, self._batches_since_snapshot, skipped)
        except (RuntimeError, MemoryError) as e:
            raise UserError(fault or f"the data graph stopped, and the shards cannot be read ({reason_of(e)})") from e
        finally:
            release_memory()

    def _drop_pipeline(self) -> None:
        vars(self).pop("pipeline", None)  # it is not there where building it failed
        release_memory()

    def _build(self, state: str | None) -> None:
        with TemporaryDirectory(prefix="simsiam-dali-") as folder:  # DALI reads the indexes once
            source, placeholders = with_placeholders(self.graph.source, self.quarantine.by_shard(), Path(folder))
            self.pipeline = build(dataclasses.replace(self.graph, source=source), self._settings, state)
        self._placeholder_rows = torch.tensor(sorted(placeholders), dtype=torch.int64)
        self._set_snapshot(state)

    def _set_snapshot(self, state: str | None) -> None:
        # After an error DALI's graph cannot be used, nor tell its state: it is rebuilt from a snapshot.
        self._snapshot, self._batches_since_snapshot, self._snapshot_time = state, 0, time.monotonic()

    def begin(self, seed: int) -> None:
        """Start from the first batch, in the order and with the draws of another seed."""
        self.step = 0
        self._settings = dataclasses.replace(self._settings, seed=seed)
        try:
            self._build(None)
        except RuntimeError as e:
            if READER not in str(e):
                raise
            raise UserError(f"the shards cannot be read ({reason_of(e)})") from e

    def state_dict(self) -> dict[str, Any]:
        """State of the reader and of every random draw after the last batch, and the rows that are skipped."""
        self._set_snapshot(self.pipeline.checkpoint())
        return {
            "step": self.step,
            "seed": self._settings.seed,
            "pipeline": self._snapshot,
            "left_out": sorted(self.quarantine.rows),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state_dict` was called: the same order, the same draws.

        Raises UserError if the state is of a graph with other operators.
        """
        self.step = state["step"]
        self._settings = dataclasses.replace(self._settings, seed=state["seed"])
        self.quarantine.rows |= set(state["left_out"])
        try:
            self._build(state["pipeline"])
        except RuntimeError as e:
            if "checkpoint might come from another pipeline" not in str(e):
                raise
            raise UserError(
                "cannot resume: the checkpoint was written by another version of simsiam_dali, whose data graph has"
                " other operators; finish the run with that version, or start a new run"
            ) from e


def release_memory() -> None:
    """Free what is no longer used: graphs, DALI's GPU and pinned pools, torch's cache, holes in glibc's heap.

    DALI's pipelines are reference cycles: without an explicit collection, those of some 25 epochs stay in memory. glibc
    keeps the holes they leave, more of them every epoch (docs/reliability.md). DALI and torch have GPU memory of their
    own, and neither asks the other for what it has cached.
    """
    gc.collect()
    backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]
    torch.cuda.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)


def measure_log_mel(loader: Loader, segments: int) -> LogMel:
    """Mean and std of the log-mel, in dB, over the first `segments` of an ordered clean loader.

    The loader's graph must have mean 0 and std 1. Shards are shuffled when packed, so the first segments are a sample.
    """
    number, first, second = 0, 0.0, 0.0  # values, their sum, the sum of their squares
    for batch in loader:
        x = batch.inputs[0].double()
        number += x.numel()
        first += x.sum().item()
        second += x.square().sum().item()
        if loader.step * loader.batch_size >= segments:
            break
    mean = first / number
    std = max((second / number - mean**2), 0.0) ** 0.5
    return dataclasses.replace(loader.graph.log_mel, mean=mean, std=max(std, 1e-3))
