"""A run in progress: where it stands, and everything that is written of it (journal, MLflow, checkpoints, terminal)."""

import errno
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import atomic_write, locked
from simsiam_dali.config.schema import Config
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.tracking.client import viewing_hints
from simsiam_dali.tracking.run import Tracker
from simsiam_dali.training import checkpoint, curves, journal
from simsiam_dali.training.collapse import collapse_advice, no_positives_advice
from simsiam_dali.training.data import TrainingData
from simsiam_dali.training.learner import Learner, describe_optimizer
from simsiam_dali.training.loss_window import LossWindow
from simsiam_dali.training.profiling import Profiler
from simsiam_dali.training.validation import Validation
from simsiam_dali.training.world_size import began_again, order_seed

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without locks answer, such as some network disks."""


class Run:
    """One training run. It is the same on every rank; only the main rank writes.

    run_dir: its folder, made here. resumed: the checkpoint to continue from. Raises UserError where the folder cannot
    be written or the MLflow server does not answer.
    """

    def __init__(
        self, data: TrainingData, learner: Learner, run_dir: Path, resumed: checkpoint.Checkpoint | None
    ) -> None:
        self.data, self.learner, self.run_dir = data, learner, run_dir
        self.config, self.world = data.config, data.world
        self.validation = Validation(data, learner)
        self.window = LossWindow(self.world, self.config)
        self.epoch, self.step = 0, 0  # whole epochs and optimizer steps done
        self.signal = 0  # that stopped the run
        self.journal = journal.Journal(run_dir / "metrics.jsonl", writes=self.world.main)
        self._unsaved: UserError | None = None  # why the newest state is not on the disk
        self._lock = ExitStack()
        self._started = time.perf_counter()
        self._resumed = resumed is not None
        self._report_quarantine()
        if resumed:
            self._restore(resumed)
        mlflow_run = resumed["mlflow_run"] if resumed else None
        self.tracker = Tracker(self.config, data.shards, run_dir.name, mlflow_run, self.world.main)
        self._report_start()
        steps_to_trace = self.config.train.profile if self.world.main else 0
        self.profiler = Profiler(steps_to_trace, run_dir, self.world.device)

    @property
    def hours(self) -> float:
        """Wall-clock time of the training in hours, including that before each resume."""
        return (time.perf_counter() - self._started) / 3600

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the training loop: sets how the run ended, FINISHED, KILLED or FAILED. The only place that does."""
        if self.world.main:
            self._hold()
        try:
            if self.world.main:
                create_run_dir(self.run_dir, self.config)
                self.tracker.log_artifact(self.run_dir / "config.yaml")
            if self._resumed:
                self.tracker.backfill(self.journal.epochs)
            yield
            if self._unsaved:
                raise self._unsaved
        except BaseException as e:
            self.tracker.end("FAILED", str(e))
            raise
        finally:
            self.profiler.stop()
            self._lock.close()
        if self.signal:
            self.tracker.end("KILLED")
            self._report_stop()
        elif self.world.main:
            self._finish()

    def _hold(self) -> None:
        """Lock the folder until the run ends. Raises UserError where another process trains in it."""
        busy = f"another process is training in {self.run_dir}: wait until it ends, or stop it"
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(locked(self.run_dir / ".lock", wait=False, refusal=busy))
        except OSError as e:
            if e.errno in NO_LOCKS:
                self.world.print(
                    f"warning: {self.run_dir} cannot be locked ({e.strerror}): do not resume it while it trains"
                )
            # That it cannot be written is reported by `create_run_dir`.

    def progress_bar(self) -> tqdm:
        """Over the steps of this epoch."""
        return tqdm(
            desc=f"epoch {self.epoch + 1}/{self.config.encoder.epochs}",
            total=self.data.steps,
            unit="step",
            leave=False,
            initial=self.data.loader.step // self.data.micro_batches,
            disable=None if self.world.main else True,
        )

    def end_epoch(self, record: dict[str, Any]) -> dict[str, Any]:
        """Validate when it is due, write the record everywhere and save a checkpoint; returns the whole record."""
        record = {"step": self.step, "epoch": self.epoch, **record}
        if self.validation.due(self.epoch):
            began = time.perf_counter()
            record |= self.validation.scores()
            record["throughput/validation_seconds"] = time.perf_counter() - began
        quarantine = self.data.loader.quarantine
        quarantine.read()  # the loaders of the validation have added to it
        quarantine.rows.update(*self.world.gather(quarantine.rows))
        quarantine.check()
        record["data/quarantined"] = len(quarantine.rows)
        self.journal.write([record])
        self.tracker.log_epoch(record)
        self.world.print(journal.epoch_line(record, self.config.encoder.epochs))
        self.save()
        return record

    def log_losses(self, losses: list[float | None]) -> None:
        """Write the losses of the steps up to this one. Raises UserError when they are not finite."""
        if not math.isfinite(sum(loss for loss in losses if loss is not None)):
            raise UserError(
                f"the loss is not finite near step {self.step}: lower encoder.learning_rate, or train with"
                f" --set train.precision=fp32; the checkpoint in {self.run_dir} is from before"
            )
        self.journal.write_losses(self.step, losses)

    def mean_loss(self) -> dict[str, float]:
        """The mean loss of the epoch that ends at this step, and its share of batches without a positive pair."""
        loss, pairless = self.journal.mean_loss(self.step, self.data.steps)
        return {"encoder/train_loss": loss, "encoder/pairless_batches": pairless}

    def stop(self, signal: int) -> int:
        """The run ends by this signal, which is returned; its state has been saved."""
        self.signal = signal
        return signal

    def print_advice(self, record: Mapping[str, Any], rows: int) -> None:
        """What to change when an epoch's gauges show a collapse, or its batches hold no positive pairs.

        rows: outputs on which the gauges were computed.
        """
        gauges = record["encoder/z_std"], self.learner.encoder.output_dim, record["encoder/effective_rank"]
        if encoder_type(self.config).warn_of_collapse and (advice := collapse_advice(*gauges, rows)):
            self.world.print(advice)
        if advice := no_positives_advice(record["encoder/pairless_batches"]):
            self.world.print(advice)

    def save_if_due(self, steps: int) -> None:
        """Save when one of the last `steps` steps was a multiple of `train.checkpoint_every`."""
        every = self.config.train.checkpoint_every
        if every and self.step % every < steps:
            self.save()

    def save(self) -> None:
        """Write a checkpoint. All ranks must call it.

        Where the disk refuses it, a warning: days of training are worth more than one checkpoint, and somebody may make
        room before the next. Raises UserError only where there is no earlier checkpoint.
        """
        ranks = self.world.gather((self.data.loader.state_dict(), checkpoint.rng_state(self.world.device)))
        if not self.world.main:
            return
        path = self.run_dir / checkpoint.FILE_NAME
        try:
            self.journal.sync()  # a resumed run reads it up to this step
            checkpoint.save(self._checkpoint(ranks), path)
            self._unsaved = None
        except (UserError, OSError) as e:
            self._unsaved = (
                e if isinstance(e, UserError) else UserError(f"cannot write {self.journal.path} ({e.strerror})")
            )
            if not path.exists():
                raise self._unsaved from e
            self.world.print(
                f"warning: step {self.step}: {self._unsaved}; training continues, and the next checkpoint is tried"
            )

    def _checkpoint(self, ranks: list[tuple[dict[str, Any], dict[str, Any]]]) -> checkpoint.Checkpoint:
        log_mel = self.data.log_mel
        return checkpoint.Checkpoint(
            format_version=checkpoint.FORMAT_VERSION,
            config=self.config.model_dump(mode="json"),
            epoch=self.epoch,
            step=self.step,
            learner=self.learner.state_dict(),
            loaders=[loader for loader, _ in ranks],
            rng=[rng for _, rng in ranks],
            log_mel={"mean": log_mel.mean, "std": log_mel.std},
            shards=self.data.shards.fingerprint,
            packing=self.data.shards.manifest.settings,
            mlflow_run=self.tracker.run_id,
            seconds=time.perf_counter() - self._started,
            device=self.world.device.type,
            outputs=self.window.outputs(),
        )

    def _restore(self, resumed: checkpoint.Checkpoint) -> None:
        """Continue exactly; with another number of ranks, from the start of the epoch (see `world_size`)."""
        self.epoch, self.step = resumed["epoch"], resumed["step"]
        self._started -= resumed["seconds"]
        self.learner.load_state_dict(resumed["learner"])
        self.window.restore(resumed.get("outputs", []))
        before = len(resumed["loaders"])
        if before == self.world.size:
            self.data.loader.load_state_dict(resumed["loaders"][self.world.rank])
            checkpoint.set_rng_state(resumed["rng"][self.world.rank], self.world.device)
        else:
            self.data.loader.begin(order_seed(self.config, self.step, self.world.size))
            if self.epoch < self.config.encoder.epochs:
                self.world.print(began_again(self.config, self.step, self.epoch, before, self.world.size))
            self.step = self.epoch * self.data.steps
        self.journal.resume(self.step)

    def _report_quarantine(self) -> None:
        quarantine = self.data.loader.quarantine
        if quarantine.rows:
            self.world.print(f"skipping {len(quarantine.rows)} segments that did not decode: see {quarantine.path}")

    def _report_start(self) -> None:
        data, config, kind = self.data, self.config, encoder_type(self.config)
        train, val = data.shards.count("train"), data.shards.count("val")
        seconds = data.loader.graph.seconds
        shape = " x ".join(map(str, kind.input_shapes(data.log_mel, seconds)[0]))
        dropped = train % data.batch_size
        self.world.print(
            f"{config.encoder.encoder_type} {kind.variant} on {self.world.device.type} x {self.world.size},"
            f" {str(self.learner.dtype).removeprefix('torch.')}: {train} training and {val} validation segments,"
            f" {'views' if kind.batches == 'views' else 'excerpts'} of {seconds:g} s ({shape}), {data.steps} steps of"
            f" {data.batch_size} an epoch"
            + (f"; drops {dropped} segment{'s' * (dropped > 1)} per epoch, not the same each time" if dropped else "")
        )
        self.world.print(describe_optimizer(config, data.batch_size))
        if data.micro_batches > 1:
            self.world.print(
                f"each step accumulates the gradients of {data.micro_batches} micro-batches of"
                f" {data.loader.batch_size} segments{' on each process' if self.world.size > 1 else ''}, with"
                " batch norm over each (train.micro_batch)"
            )
        if self.config.train.compile:
            self.world.print("the first step compiles the encoder, which can take minutes (train.compile)")
        if self.validation.every > 1 and val:
            self.world.print(f"validation every {self.validation.every} epochs (train.validate_every)")
        self.world.print(f"run {self.run_dir}" + (f", continuing after step {self.step}" if self._resumed else ""))

    def _report_stop(self) -> None:
        where = f"epoch {self.epoch}" if self.step == self.epoch * self.data.steps else f"step {self.step}"
        self.world.print(f"stopped after {where}: continue with --resume {self.run_dir}")

    def _finish(self) -> None:
        path, output_dim = self.run_dir / "curves.png", self.learner.encoder.output_dim
        try:
            curves.draw(self.journal.epochs, output_dim, path)
            self.tracker.log_artifact(path)
        except OSError as e:
            self.world.print(f"warning: cannot write {path} ({e.strerror}); --resume {self.run_dir} draws it again")
        if self.config.mlflow.log_checkpoint:
            self.tracker.log_artifact(self.run_dir / checkpoint.FILE_NAME)
        self.tracker.end("FINISHED")
        healthy = output_dim**-0.5 if encoder_type(self.config).warn_of_collapse else None
        for line in journal.closing_lines(healthy, self.run_dir, self.journal.epochs):
            self.world.print(line)
        for line in viewing_hints(self.config.mlflow):
            self.world.print(line)
        if not self.tracker.complete:
            self.world.print(
                f"MLflow lacks a part of this run: when it answers again, send it with --resume {self.run_dir}"
            )


def create_run_dir(run_dir: Path, config: Config) -> None:
    """Make the run's folder with its settings, and remove what a killed process left half written.

    Raises UserError where that cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.part*", ".*.part*"):
            for left in run_dir.glob(pattern):
                left.unlink()
        with atomic_write(run_dir / "config.yaml") as part:
            part.write_text(config.to_yaml())
    except OSError as e:
        raise UserError(f"cannot write into {run_dir} ({e.strerror}): make room, or choose another folder") from e
