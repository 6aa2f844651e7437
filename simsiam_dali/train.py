"""Train an encoder: python -m simsiam_dali.train --encoder-type simsiam

Settings rise in priority: the config file, the environment (ENCODER_TYPE, MLFLOW_TRACKING_URI), the command line.
Without --config, configs/gpu.yaml is taken where there is a GPU and configs/cpu.yaml where there is none. Several GPUs:
torchrun --nproc-per-node N -m simsiam_dali.train ...
"""

import argparse
import functools
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from simsiam_dali import checkpoint, factory, journal, micro_batch, monitor, plots, profiling, tracking, tuning
from simsiam_dali import config as settings
from simsiam_dali.cli import program
from simsiam_dali.clock import StepClock
from simsiam_dali.config import Config
from simsiam_dali.data.loader import measure_log_mel, release_memory
from simsiam_dali.data.shards import open_shards
from simsiam_dali.distributed import World, choose_device, is_main, one_voice, world
from simsiam_dali.encoders import encoder_type
from simsiam_dali.errors import UserError, one_line_errors
from simsiam_dali.learner import Learner, groups
from simsiam_dali.options import add_setting
from simsiam_dali.ranks import order_seed, shared_anew
from simsiam_dali.schedule import learning_rates
from simsiam_dali.shipped import config_file
from simsiam_dali.validation import Validation

GAUGE_ROWS = 1024
"""Outputs, of the latest batches, on which the collapse gauges are read."""

CHANGEABLE = (
    "train.log_every", "train.checkpoint_every", "train.validate_every", "train.profile", "data.threads",
    "data.prefetch", "data.max_bad_fraction", "train.device", "train.closing_score", "mlflow.",
)  # fmt: skip
"""Settings a resumed run may change: none of them changes the next loss (`check_device` sees to the device)."""


class Interrupt:
    """Turns SIGINT and SIGTERM into a request to stop after the step; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)


class Stop(Exception):
    """Raised by `on_epoch` when it has seen enough; says why. The run ends as KILLED, not as FAILED."""


def train(
    config: Config,
    w: World,
    resumed: checkpoint.Checkpoint | None,
    run_dir: Path,
    on_epoch: Callable[[dict[str, Any]], None] = lambda _: None,
    tags: Mapping[str, str] | None = None,
) -> int:
    """Train until done or interrupted; returns the number of the signal that ended it, or 0.

    on_epoch: called on every rank with each epoch's record, the untrained encoder's as epoch 0; what it raises ends the
    run. tags: set on the MLflow run beside those of the config.
    """
    interrupt = Interrupt()
    say = functools.partial(tqdm.write, file=sys.stdout) if w.main else (lambda _: None)
    log_every = config.train.log_every
    kind = encoder_type(config)

    # Model, loss, optimizer; and how much of a batch fits into memory beside them.
    shards = open_shards(config.data.shards)
    if resumed:
        check_same_shards(resumed, shards.fingerprint, run_dir)
    config = micro_batch.estimated(config, shards, w, say)
    learner = Learner(config, shards, w, pretrained=resumed is None)
    if w.device.type in micro_batch.REHEARSED:
        exact = resumed is not None and len(resumed["loaders"]) == w.size
        config = micro_batch.rehearsed(config, learner, shards, w, keep=exact)
        learner.micro_batches = config.encoder.batch_size // config.train.micro_batch_of(config.encoder.batch_size)

    # Data: the log-mel's mean and std come first, since they are part of the graph.
    log_mel = factory.log_mel_settings(config)
    if config.data.threads == "auto":
        config = tuning.with_threads(config, shards, log_mel, w)
        say(f"measured: {config.data.threads} DALI threads, {config.data.prefetch} batches ahead")
    if resumed:
        log_mel = factory.with_statistics(log_mel, **resumed["log_mel"])
    elif kind.batches == "views":
        everything = World(0, 1, w.device)  # all ranks measure the same segments
        clean = factory.create_loader(config, shards, log_mel, everything, "train", "clean")
        log_mel = measure_log_mel(clean, config.data.stats_segments)
        del clean
    loader = factory.create_loader(config, shards, log_mel, w, "train", kind.batches, shuffled=True)
    release_memory()  # of the graphs that measured
    quarantine = loader.quarantine
    if quarantine and quarantine.rows:
        say(f"{len(quarantine.rows)} segments that did not decode are left out from the start: see {quarantine.path}")
    micro_batches = learner.micro_batches
    steps = len(loader) // micro_batches  # an epoch
    batch_size = config.encoder.batch_size * w.size  # segments a step
    shapes = kind.input_shapes(log_mel, loader.graph.seconds)
    validation = Validation(config, shards, log_mel, w, learner)

    # Where we stand
    epoch, step, seconds = 0, 0, 0.0  # whole epochs, optimizer steps, time spent
    log = journal.Journal(run_dir / "metrics.jsonl", writes=w.main)
    if resumed:
        epoch, step, seconds = resumed["epoch"], resumed["step"], resumed["seconds"]
        learner.load_state_dict(resumed["learner"])
        if len(resumed["loaders"]) == w.size:
            loader.load_state_dict(resumed["loaders"][w.rank])
            checkpoint.set_rng_state(resumed["rng"][w.rank], w.device)
        else:
            loader.begin(order_seed(config, step, w.size))
            say(
                f"saved after step {step} by {len(resumed['loaders'])} processes, now {w.size} with"
                f" {config.encoder.batch_size} segments a step each: epoch {epoch + 1} from its start, in a new order"
            )
            step = epoch * steps
        log.resume(step)
    mlflow_run = resumed["mlflow_run"] if resumed else None
    tracker = tracking.create_tracker(config, shards, run_dir.name, mlflow_run, w.main, tags or {})
    started = time.perf_counter() - seconds
    unsaved: UserError | None = None  # why the newest state is not on the disk

    def save() -> None:
        nonlocal unsaved
        ranks = w.gather((loader.state_dict(), checkpoint.rng_state(w.device)))
        if w.main:
            state = checkpoint.Checkpoint(
                format_version=checkpoint.FORMAT_VERSION,
                config=config.model_dump(mode="json"),
                epoch=epoch,
                step=step,
                learner=learner.state_dict(),
                loaders=[place for place, _ in ranks],
                rng=[rng for _, rng in ranks],
                log_mel={"mean": log_mel.mean, "std": log_mel.std},
                shards=shards.fingerprint,
                packing=shards.manifest.settings,
                mlflow_run=tracker.run_id,
                seconds=time.perf_counter() - started,
                device=w.device.type,
            )
            try:
                log.sync()  # a resumed run reads it up to this step
                checkpoint.save(state, run_dir / checkpoint.FILE_NAME)
                unsaved = None
            except (UserError, OSError) as e:
                unsaved = e if isinstance(e, UserError) else UserError(f"cannot write {log.path} ({e.strerror})")
                if not (run_dir / checkpoint.FILE_NAME).exists():
                    raise unsaved from e
                # Days of training are worth more than one checkpoint, and somebody may make room before the next.
                say(f"warning: step {step}: {unsaved}; training goes on, and the next one is tried")

    def finish_epoch(record: dict[str, Any]) -> None:
        if validation.due(epoch):
            began = time.perf_counter()
            record |= validation.scores()
            record["throughput/validation_seconds"] = time.perf_counter() - began
        if quarantine:
            quarantine.read()  # the loaders of the validation have met others
            quarantine.rows.update(*w.gather(quarantine.rows))
            quarantine.check()
            record["data/quarantined"] = len(quarantine.rows)
        log.write([record])
        tracker.epoch(record)
        say(journal.epoch_line(record, config.encoder.epochs))
        save()
        on_epoch(record)

    left_over = shards.count("train") % batch_size
    say(
        f"{config.encoder.encoder_type} {kind.variant(config)} on {w.device.type} x {w.size},"
        f" {str(learner.dtype).removeprefix('torch.')}: {shards.count('train')} training and"
        f" {shards.count('val')} validation segments, {'views' if kind.batches == 'views' else 'excerpts'} of"
        f" {loader.graph.seconds:g} s ({' x '.join(map(str, shapes[0]))}), {steps} steps of {batch_size} an epoch"
        + (f"; each epoch leaves out {left_over} segments, different ones each time" if left_over else "")
    )
    if micro_batches > 1:
        say(
            f"each step adds up the gradients of {micro_batches} micro-batches of {loader.batch_size} segments"
            f"{' on each process' if w.size > 1 else ''}, with batch norm over each (train.micro_batch)"
        )
    if validation.every > 1 and shards.count("val"):
        say(f"validation every {validation.every} epochs (train.validate_every)")
    say(f"run {run_dir}" + (f", going on after step {step}" if resumed else ""))
    clock = StepClock(w.device)
    profiler = profiling.create_profiler(config.train.profile if w.main else 0, run_dir, w.device)
    recent: deque[Tensor] = deque(maxlen=max(1, GAUGE_ROWS // config.encoder.batch_size))
    try:
        if w.main:
            prepare(run_dir, config)
            tracker.artifact(run_dir / "config.yaml")
        if resumed:
            tracker.catch_up(log.epochs)
        else:
            finish_epoch({"step": 0, "epoch": 0})  # the untrained encoder: what training has to beat
        while epoch < config.encoder.epochs:
            learner.encoder.train()
            losses: list[Tensor] = []  # (loss, whether it counts), on the device until they are read together
            bar = tqdm(desc=f"epoch {epoch + 1}/{config.encoder.epochs}", total=steps, unit="step", leave=False,
                       initial=loader.step // micro_batches, disable=None if w.main else True)  # fmt: skip
            clock.reset()
            for batches in groups(clock.batches(loader), micro_batches):
                lr, fixed_lr = learning_rates(config, step, steps, batch_size)
                scored = learner.step(batches, lr, fixed_lr)

                step += 1
                losses.append(torch.stack([scored.loss, scored.counts]))
                recent.append(scored.z)
                profiler.step()
                bar.update()
                last = loader.step == len(loader)
                if len(losses) < log_every and not last and not (interrupt.signal and w.size == 1):
                    continue

                # The only place inside an epoch where the host waits for the device, and the ranks for each other.
                ranks = w.gather((torch.stack(losses).tolist(), interrupt.signal))
                losses.clear()
                values = [mean_where_it_counts(of_ranks) for of_ranks in zip(*(v for v, _ in ranks), strict=True)]
                if not math.isfinite(sum(v for v in values if v is not None)):
                    raise UserError(
                        f"the loss is not finite near step {step}: lower encoder.learning_rate, or train with"
                        f" --set train.precision=fp32; the checkpoint in {run_dir} is from before"
                    )
                log.write_losses(step, values)
                elapsed, waited = clock.read()
                speed = clock.steps * batch_size / micro_batches / elapsed
                loss = f"loss {values[-1]:.4f}" if values[-1] is not None else "no positive pair"
                bar.set_postfix_str(f"{loss}, {speed:.1f} samples/s, waiting for data {waited:.0%}")
                if last:  # finish the epoch before stopping or saving
                    continue
                if stop := max(signal for _, signal in ranks):
                    bar.close()
                    save()
                    if unsaved:
                        raise unsaved
                    tracker.end("KILLED")
                    say(f"stopped after step {step}: go on with --resume {run_dir}")
                    return stop
                if config.train.checkpoint_every and step % config.train.checkpoint_every < len(values):
                    save()
            bar.close()

            epoch += 1
            elapsed, waited = clock.read()
            z = torch.cat(list(recent))
            mean_loss, pairless = log.mean_loss(step, steps)
            record = {
                "step": step,
                "epoch": epoch,
                "encoder/train_loss": mean_loss,
                "encoder/pairless_batches": pairless,
                "encoder/lr": lr,
                "encoder/z_std": float(monitor.z_std(z)),
                "encoder/effective_rank": float(monitor.effective_rank(z)),
                "throughput/samples_per_s": clock.steps * batch_size / micro_batches / elapsed,
                "throughput/data_wait_share": waited,
                "training_time_hours": (time.perf_counter() - started) / 3600,
            }
            finish_epoch(record)
            gauges = record["encoder/z_std"], z.shape[1], record["encoder/effective_rank"]
            if advice := kind.warn_of_collapse and monitor.collapse_advice(*gauges):
                say(advice)
            if advice := monitor.pairless_advice(pairless):
                say(advice)
            if stop := max(w.gather(interrupt.signal)):
                if unsaved:
                    raise unsaved
                tracker.end("KILLED")
                say(f"stopped after epoch {epoch}: go on with --resume {run_dir}")
                return stop
        if unsaved:
            raise unsaved
    except Stop as e:
        tracker.end("KILLED", str(e))
        raise
    except BaseException as e:
        tracker.end("FAILED", str(e))
        raise
    finally:
        profiler.stop()

    if w.main:
        try:
            plots.curves(log.epochs, learner.encoder.output_dim, run_dir / "curves.png")
            tracker.artifact(run_dir / "curves.png")
        except OSError as e:
            say(f"warning: cannot write {run_dir / 'curves.png'} ({e.strerror}); --resume {run_dir} draws it again")
        if config.mlflow.log_checkpoint:
            tracker.artifact(run_dir / checkpoint.FILE_NAME)
        tracker.end("FINISHED")
        for line in (
            *journal.closing_lines(learner.encoder.output_dim, run_dir, log.epochs),
            *tracking.how_to_look(config),
        ):
            say(line)
        if not tracker.complete:
            say(f"MLflow lacks a part of this run: when it answers again, send it with --resume {run_dir}")
    return 0


def prepare(run_dir: Path, config: Config) -> None:
    """Make the run's folder, with its settings and without what a killed process left half written.

    Raises UserError where that cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for left in run_dir.glob("*.part*"):
            left.unlink()
        part = run_dir / "config.part"
        part.write_text(config.to_yaml())
        part.replace(run_dir / "config.yaml")
    except OSError as e:
        raise UserError(f"cannot write into {run_dir} ({e.strerror}): make room, or choose another") from e


def mean_where_it_counts(ranks: Sequence[tuple[float, float]]) -> float | None:
    """One step's loss from each rank's (loss, whether it counts); None where no rank had anything to learn from."""
    counting = [loss for loss, counts in ranks if counts]
    return sum(counting) / len(counting) if counting else None


def check_same_shards(resumed: checkpoint.Checkpoint, fingerprint: str, run_dir: Path) -> None:
    """Refuse to go on with other data than the run began with."""
    if resumed["shards"] != fingerprint:
        raise UserError(
            f"the shards were packed again since {run_dir} began, so it cannot go on as it was: start a new run, or"
            " bring the old shards back"
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = argparse.ArgumentParser(
        prog=program("train"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    setting = functools.partial(add_setting, parser)
    parser.add_argument(
        "--config",
        type=config_file,
        metavar="FILE",
        help="YAML settings, or a name of configs/ such as demo (default: gpu or cpu)",
    )
    setting("--encoder-type", "encoder.encoder_type", "TYPE")
    setting("--shards", "data.shards", "DIR")
    setting("--epochs", "encoder.epochs", "N")
    setting("--batch-size", "encoder.batch_size", "N")
    setting("--device", "train.device", choices=["auto", "cpu", "gpu"])
    setting("--seed", "train.seed", "N")
    setting("--profile", "train.profile", "N")
    setting("--run-name", "train.run_name", "NAME")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="RUN",
        help="go on where a run stopped: its folder, its checkpoint, or the newest run when no name is given",
    )  # fmt: skip
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        dest="assignments",
        help="any setting by its dotted key",
    )
    return parser


def who_chose(key: str, file: Path, given: dict[str, Any], assignments: list[str]) -> str:
    """One line: the value of `key`, where it comes from, and what it was chosen over."""
    said = settings.said_of(key, file, os.environ, given, assignments)
    if not said:
        return f"{key} has its default"
    source, value = said[-1]
    others = [f"{v} ({s})" for s, v in reversed(said[:-1]) if v != value]
    return f"{key} = {value} ({source})" + (f", over {', '.join(others)}" if others else "")


def configure(args: argparse.Namespace) -> tuple[Config, checkpoint.Checkpoint | None, Path]:
    """(settings, checkpoint to go on from, the run's folder) from the command line and what it names."""
    given = {key: value for key, value in vars(args).items() if "." in key and value is not None}
    if args.resume is None:
        file = args.config or factory.default_config_file(choose_device(given.get("train.device", "auto")))
        config = settings.load(file, os.environ, given, args.assignments)
        if is_main():
            print(f"settings from {file}, then the environment and the command line")
            print(who_chose("encoder.encoder_type", file, given, args.assignments))
        variant = encoder_type(config).variant(config)
        name = config.train.run_name or f"{config.encoder.encoder_type}-{variant}-{time.strftime('%Y%m%d-%H%M%S')}"
        run_dir = config.train.runs_dir / name
        if (run_dir / checkpoint.FILE_NAME).exists():
            raise UserError(
                f"{run_dir} holds a run already: choose another --run-name, or go on with --resume {run_dir}"
            )
        return config, None, run_dir

    over = settings.load(None, None, given, args.assignments)
    runs_dir = over.train.runs_dir
    path = checkpoint.find(args.resume, runs_dir)
    resumed = checkpoint.load(path)
    if args.config:
        raise UserError("--resume goes on with the run's own settings: leave --config out, or start a new run")
    before = settings.load(base=resumed["config"])
    config = settings.load(None, None, given, args.assignments, base=resumed["config"])
    changed = [k for k, v in tracking.flat(config).items() if v != tracking.flat(before)[k]]
    refused = [k for k in changed if not k.startswith(CHANGEABLE)]
    if refused:
        raise UserError(f"--resume cannot change {', '.join(refused)}, the run would not be the same: start a new run")
    return config, resumed, path.parent


@one_line_errors
@one_voice
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    config, resumed, run_dir = configure(args)
    with world(config.train.device) as w:
        if resumed:
            checkpoint.check_device(resumed, w.device, run_dir)
        if resumed and len(resumed["loaders"]) != w.size:
            config = shared_anew(config, len(resumed["loaders"]), w.size)
        try:
            ended_by = train(config, w, resumed, run_dir)
            if config.train.closing_score and not ended_by:
                from simsiam_dali import outcome  # scikit-learn, which the training itself does without

                if (line := outcome.of_run(run_dir, w)) and w.main:
                    print(line)
        except torch.OutOfMemoryError as e:
            raise UserError(
                f"out of memory on {w.device}: use a smaller train.micro_batch (the first lines name the one in use),"
                " shorter views (--set data.view_seconds=...) or --set train.activation_checkpointing=true"
            ) from e
    sys.exit(128 + ended_by if ended_by else 0)


if __name__ == "__main__":
    main()
