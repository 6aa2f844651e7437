"""The metrics of a run, runs/<name>/metrics.jsonl, and their lines on the terminal. MLflow gets the same numbers."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simsiam_dali.common.errors import UserError


class Journal:
    """One line for each step with its loss, one for each epoch with everything else; kept in memory too.

    writes: False on the ranks that only keep them in memory.
    """

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.losses: dict[
            int, float | None
        ] = {}  # optimizer step -> training loss; None: no positive pair in the batch
        self.epochs: list[dict[str, Any]] = []
        self._written = 0  # bytes of the file that are whole lines
        self._unwritten = b""

    def resume(self, step: int) -> None:
        """Read the records up to the checkpoint at `step`; later ones will be written again.

        Raises UserError for a file that is not a journal.
        """
        records, self._written = [], 0
        try:
            for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []:
                if not line.endswith(b"\n") or (record := json.loads(line))["step"] > step:
                    break  # cut short by a kill, or later than the checkpoint
                records.append(record)
                self._written += len(line)
            self._keep(records)
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(f"{self.path} is damaged: delete it, and this run's curves start again here") from e

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append records; a number that is not finite becomes null.

        Records that a full disk refuses are written with the next ones.
        """
        records = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in records
        ]
        self._keep(records)
        if not self.writes:
            return
        self._unwritten += "".join(json.dumps(r) + "\n" for r in records).encode()
        with contextlib.suppress(OSError):  # `sync` reports it
            self._append()

    def sync(self) -> None:
        """Flush to the disk, before the checkpoint that relies on it. Raises OSError."""
        self._append()
        if self.path.exists():
            with self.path.open("ab") as f:
                os.fsync(f.fileno())

    def _append(self) -> None:
        if self._unwritten:
            with self.path.open("ab") as f:
                f.truncate(self._written)  # half a line on a full disk, or what a killed run wrote after its checkpoint
                f.write(self._unwritten)
            self._written += len(self._unwritten)
            self._unwritten = b""

    def write_losses(self, last_step: int, losses: list[float | None]) -> None:
        """Append the losses of the steps up to `last_step`; None where a batch had no positive pair."""
        first = last_step - len(losses) + 1
        self.write([{"step": first + i, "loss": loss} for i, loss in enumerate(losses)])

    def mean_loss(self, last_step: int, steps: int) -> tuple[float, float]:
        """(mean loss, share of steps without one) of the `steps` steps up to `last_step`.

        Steps that are missing since the journal was deleted do not count.
        """
        every = [self.losses[s] for s in range(last_step - steps + 1, last_step + 1) if s in self.losses]
        losses = [loss for loss in every if loss is not None]
        return sum(losses) / len(losses) if losses else math.nan, 1 - len(losses) / len(every)

    def _keep(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            if "epoch" in record:
                self.epochs.append(record)
            else:
                self.losses[record["step"]] = record["loss"]


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """One epoch in one line."""

    def show(name: str, form: str, label: str) -> Iterator[str]:
        value = record.get(name)
        if value is not None and math.isfinite(value):
            yield f"{label} {value:{form}}"

    parts = [
        *show("encoder/train_loss", ".4f", "loss"),
        *show("encoder/val_loss", ".4f", "val"),
        *show("encoder/z_std", ".4f", "z-std"),
        *show("encoder/effective_rank", ".1f", "rank"),
        *show("knn/artist", ".2f", "kNN artist"),
        *show("knn/genre", ".2f", "genre"),
        *show("knn/rating_mae", ".3f", "rating MAE"),
        *show("throughput/samples_per_s", ".1f", "samples/s"),
        *show("throughput/data_wait_share", ".0%", "waiting for data"),
    ]
    return f"epoch {record['epoch']}/{epochs}  " + "  ".join(parts)


def closing_lines(healthy: float | None, run_dir: Path, epochs: list[dict[str, Any]]) -> Iterator[str]:
    """The last epoch's scores beside those of the untrained encoder and of a guess, and the run's files.

    Without those of epoch 0, or without any, where the journal was deleted in between. healthy: the z-std of outputs
    that have not collapsed, None for an encoder type that cannot collapse.
    """
    untrained = epochs[0] if epochs and epochs[0]["epoch"] == 0 else {}
    last = epochs[-1] if epochs else {}
    scores = (
        ("knn/artist", "kNN artist, accuracy", "a guess"),
        ("knn/genre", "kNN genre, accuracy", "a guess"),
        ("knn/rating_mae", "kNN rating, mean abs. error", "the median rating"),
    )
    for name, label, guess in scores:
        if last.get(name) is not None:
            first = f"untrained encoder {untrained[name]:.3f}, " if untrained.get(name) is not None else ""
            songs = f"; {count:.0f} songs" if (count := last.get(f"{name}_songs")) is not None else ""
            yield f"{label} {last[name]:.3f}  ({first}{guess} {last[name + '_chance']:.3f}{songs})"
    if healthy is not None and last.get("encoder/z_std") is not None:
        yield f"z-std {last['encoder/z_std']:.4f}  (healthy: about {healthy:.4f})"
    yield f"checkpoint {run_dir / 'checkpoint.pt'}"
    yield f"curves     {run_dir / 'curves.png'}"
