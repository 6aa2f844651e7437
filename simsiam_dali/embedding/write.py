"""Write an embedding table: every segment once through the data graph of the training, then the mean over each song's.

The views are clean. Killed at any moment, the same call continues from the last part and writes the same bytes.
"""

import fcntl
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from tqdm import tqdm

from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import atomic_write, refuse_failed_write
from simsiam_dali.config.load import replace_settings
from simsiam_dali.config.schema import Config
from simsiam_dali.data.format import SPLITS, Split
from simsiam_dali.data.graph import LogMel
from simsiam_dali.data.loader import Batch, Loader
from simsiam_dali.data.quarantine import Quarantine
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.embedding.features import CHECKPOINT, Features
from simsiam_dali.embedding.run import TrainedRun
from simsiam_dali.embedding.table import Embeddings, read_provenance, write_embeddings
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training.data import create_loader, view_seconds
from simsiam_dali.training.throughput import StepClock

PART_SECONDS = 10.0
"""How much work a kill can cost. The host waits for the device once per part."""

TABLE_VERSION = "3"
"""Incremented when the same songs and checkpoint give another table: 2 added the covariance within songs, 3 its degrees
of freedom."""

FORWARD_SHARE = 4
"""A batch may hold this many times the audio of a training batch: nothing is kept for a backward pass."""


@dataclass(frozen=True)
class CleanViews:
    """The clean views that features are computed from: of the shards, by the config's front end."""

    config: Config
    shards: ShardSet
    log_mel: LogMel
    world: World

    def loaders(self, mode: Literal["clean", "raw"], first: Split = SPLITS[0]) -> Iterator[tuple[Split, Loader]]:
        """This rank's part of each split from `first` on, in the stored order."""
        for split in SPLITS[SPLITS.index(first) :]:
            if self.shards.count(split):
                yield split, create_loader(self.config, self.shards, self.log_mel, self.world, split, mode)


class PartialResults:
    """Rows embedded so far, from which the same command continues after a kill with the same bytes.

    `folder` has a part for some batches, `NNNNNN.pt`, written atomically; parts of another `key` are removed. Use with
    `with`: the folder is locked meanwhile. Raises UserError where it cannot be written, or another process holds it.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder, self.key = folder, key
        # rows (n,) int64; vectors (n, D) float32; their split; the loader's state after them, None at the split's end
        self.parts: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"another process is working in {self.folder}: wait until it ends") from e
        except OSError as e:
            raise UserError(f"cannot write {self.folder}: {e.strerror}") from e
        while (path := self._file(len(self.parts))).exists():
            try:
                part = torch.load(path, weights_only=True)
            except (OSError, RuntimeError, EOFError, ValueError, TypeError, KeyError, pickle.UnpicklingError):
                break
            if part.get("key") != self.key:
                break
            self.parts.append(part)
        for path in self.folder.glob("*.pt*"):  # unreadable, of another key, or behind such a part
            if not path.stem.isdigit() or int(path.stem) >= len(self.parts):
                path.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def __len__(self) -> int:
        """Number of rows."""
        return sum(len(part["rows"]) for part in self.parts)

    def add(self, rows: Tensor, vectors: Tensor, split: Split, loader: dict[str, Any] | None) -> None:
        """Store rows `(n,)` and vectors `(n, D)`, on the CPU, and the loader's state after them."""
        part = {"key": self.key, "rows": rows, "vectors": vectors, "split": split, "loader": loader}
        path = self._file(len(self.parts))
        with refuse_failed_write(path, "the parts before it are kept"), atomic_write(path) as file:
            torch.save(part, file)
        self.parts.append(part)

    def take(self) -> tuple[Tensor, Tensor]:
        """All rows `(N,)`, ascending, and their vectors `(N, D)`; the parts have none afterwards.

        Moved one by one, since the vectors of a large library's segments should not be in memory several times.
        """
        rows, order = torch.cat([part["rows"] for part in self.parts]).sort()
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order))
        vectors = torch.empty(len(rows), self.parts[0]["vectors"].shape[1])
        for part, own in zip(self.parts, position.split([len(part["rows"]) for part in self.parts]), strict=True):
            vectors[own] = part.pop("vectors")
        return rows, vectors

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.pt"


def embed_batches(
    features: Features,
    batches: Iterable[Batch],
    results: PartialResults,
    split: Split,
    loader_state: Callable[[], dict[str, Any]],
) -> Iterator[Tensor]:
    """Embed batches into `results`; yields each batch's segments `(B,)` once its work is queued on the device.

    loader_state: the state after the latest batch.
    """
    rows: list[Tensor] = []
    vectors: list[Tensor] = []  # on the device: the host waits for it once per part
    since = time.perf_counter()
    for batch in batches:
        vectors.append(features.compute(batch.inputs[0]))
        rows.append(batch.segment)
        yield batch.segment
        if time.perf_counter() - since >= PART_SECONDS:
            results.add(torch.cat(rows).cpu(), check_finite(torch.cat(vectors).cpu()), split, loader_state())
            rows, vectors, since = [], [], time.perf_counter()
    if rows:
        results.add(torch.cat(rows).cpu(), check_finite(torch.cat(vectors).cpu()), split, None)


def embed_segments(features: Features, views: CleanViews, results: PartialResults) -> str:
    """Embed every segment that `results` lacks; returns the throughput."""
    shards = views.shards
    total = len(shards.segments) if shards.rows is None else len(shards.rows)
    clock, done = StepClock(views.world.device), len(results)
    last = results.parts[-1] if results.parts else {"split": None}
    with tqdm(total=total, initial=done, unit="segment", desc=features.name, disable=None) as bar:
        for split, loader in views.loaders(features.mode, last["split"] or SPLITS[0]):
            if split == last["split"]:
                if last["loader"] is None:
                    continue
                loader.load_state_dict(last["loader"])
            for segment in embed_batches(features, clock.batches(loader), results, split, loader.state_dict):
                bar.update(len(segment))
    seconds, waited = clock.read()
    hours = (len(results) - done) * view_seconds(views.config, shards) / 3600
    return f"{hours / seconds:.3g} audio-h/s, waiting for data {waited:.0%}"


def check_finite(vectors: Tensor) -> Tensor:
    """`vectors`. Raises UserError where they are not finite."""
    if not vectors.isfinite().all():
        raise UserError("the encoder gives values that are not finite: its training diverged, or try --precision fp32")
    return vectors


def write_table(features: Features, views: CleanViews, provenance: dict[str, str], out: Path) -> str:
    """Embed the shards and write the table `out`; returns a line that describes it."""
    config, shards = views.config, views.shards
    key = {
        **provenance,
        "device": views.world.device.type,
        "dtype": str(features.dtype),
        "batch_size": config.encoder.batch_size,  # with another, a sum's order and so its last bit may differ
    }
    del key["rows"], key["checkpoint"]
    provenance = provenance | {"precision": dtype_name(features.dtype)}
    # Hidden, so that no search for songs looks into it.
    with PartialResults(out.with_name(f".{out.name}.partial"), key) as results:
        speed = embed_segments(features, views, results)
        rows, vectors = results.take()
        quarantine = Quarantine(shards, config.data.max_bad_fraction)
        wanted = range(len(shards.segments)) if shards.rows is None else shards.rows.tolist()
        missing = set(wanted) - set(rows.tolist())
        if len(rows) + len(missing) != len(wanted) or not missing <= quarantine.rows:
            raise AssertionError("the data graph did not give each segment once")
        if provenance["rows"] == "segments":
            segments = shards.segments.iloc[rows.numpy()]
            table = Embeddings.of_songs(shards.songs, segments["song"].to_numpy(), vectors.numpy(), provenance)
            table.table.insert(1, "segment", rows.numpy())
            table.table.insert(2, "start", segments["start"].to_numpy())
        else:
            song = torch.tensor(shards.segments["song"].to_numpy())[rows]
            songs, means, within = features.of_songs(vectors, song)
            table = Embeddings.of_songs(shards.songs, songs.numpy(), means.numpy(), provenance, within)
        write_embeddings(out, table)
        shutil.rmtree(results.folder)
    without = f", without {len(missing)} segments that do not decode (see {quarantine.path})" if missing else ""
    size = f"{len(table.table)} {provenance['rows']} x {vectors.shape[1]} ({provenance['embedding']})"
    return f"{out}: {size}{without}; {speed}"


def is_up_to_date(out: Path, provenance: dict[str, str], replace: bool) -> bool:
    """Whether `out` already holds this table. Raises UserError when it holds something else, unless `replace`.

    The precision is compared where `provenance` has one: a table that a GPU made in bf16 is as good as any unless
    another one is asked for.
    """
    if not out.exists():
        return False
    try:
        found = read_provenance(out)
        compared = ("features", "rows", "checkpoint_sha256", "shards", "embedding", "view_seconds", "table_version")
        differ = [name for name in compared if found.get(name) != provenance[name]]
        precision = provenance.get("precision")
        if precision and found.get("precision", precision) != precision:
            differ.append("precision")  # older tables do not say theirs
        if not differ:
            return True
        reason = f"holds embeddings of other {', '.join(n.removesuffix('_sha256').replace('_', ' ') for n in differ)}"
    except UserError:
        reason = "is not a table of embeddings that this program reads"
    if not replace:
        raise UserError(f"{out} {reason}: name another --out, or give --replace")
    return False


def dtype_name(dtype: torch.dtype) -> str:
    """What provenance calls a precision, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def embedding_config(
    config: Config,
    segment_seconds: float,
    view_seconds: float | None = None,
    batch: int | None = None,
    threads: int | None = None,
    **settings: object,
) -> Config:
    """The training's settings, adapted to embedding segments of this length; None = the default of the command.

    settings: others to change, by dotted key with __ for the dot.
    """
    view = segment_seconds if view_seconds is None else view_seconds
    own = len(os.sched_getaffinity(0)) if config.data.threads == "auto" else config.data.threads
    training_view = config.data.view_seconds or segment_seconds
    if batch is None:  # so that batches need no more memory than the training's
        at_once = config.train.micro_batch_of(config.encoder.batch_size)
        batch = max(2, min(at_once, int(FORWARD_SHARE * at_once * training_view / view)))
    return replace_settings(
        config,
        data__view_seconds=view,
        data__threads=own if threads is None else threads,
        encoder__batch_size=batch,
        train__micro_batch="auto",  # a batch here makes no step
        encoder__simsiam__augmentation__spec_augment=False,  # a mask longer than a short view would be refused
        **settings,
    )


def table_provenance(name: str, rows: str, run: TrainedRun, music: str, fingerprint: str) -> dict[str, str]:
    """`Embeddings.provenance` of a table of the features `name`, with one row per "songs" or "segments"."""
    config, output = run.config, name
    if name in (CHECKPOINT, "untrained"):
        output = config.encoder.simsiam.embedding if "backbone" in encoder_type(config).outputs else "embedding"
    return {
        "features": name,
        "rows": rows,
        "encoder_type": config.encoder.encoder_type,
        "embedding": output,
        "checkpoint": str(run.path),
        "checkpoint_sha256": run.sha256,
        "music": music,
        "shards": fingerprint,
        "view_seconds": f"{config.data.view_seconds:g}",
        "table_version": TABLE_VERSION,
        "mlflow_run": run.mlflow_run or "",
        "tracking_uri": config.mlflow.tracking_uri,
    }
