"""The training loop."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError
from simsiam_dali.common.signals import Interrupt
from simsiam_dali.config.schema import Config
from simsiam_dali.data.shards import open_shards
from simsiam_dali.models.encoder import LossOutput
from simsiam_dali.training import micro_batch
from simsiam_dali.training.checkpoint import Checkpoint
from simsiam_dali.training.collapse import effective_rank, z_std
from simsiam_dali.training.data import TrainingData
from simsiam_dali.training.learner import Learner, groups, learning_rates
from simsiam_dali.training.run import Run
from simsiam_dali.training.throughput import StepClock

GAUGE_ROWS = 1024
"""Outputs, of the latest batches, on which the collapse gauges are computed."""


def train(config: Config, world: World, resumed: Checkpoint | None, run_dir: Path) -> int:
    """Train until done or interrupted; returns the number of the signal that ended it, or 0."""
    with Interrupt() as interrupt:
        run = open_run(config, world, resumed, run_dir)
        config, data, learner = run.config, run.data, run.learner
        window, clock = LossWindow(world, config), StepClock(world.device)

        with run.recording():
            if not resumed:
                run.end_epoch({})  # the untrained encoder: what training has to beat
            while run.epoch < config.encoder.epochs:
                learner.encoder.train()
                clock.reset()
                with run.progress_bar() as bar:
                    for batches in groups(clock.batches(data.loader), data.micro_batches):
                        rates = learning_rates(config, run.step, data.steps, data.batch_size)
                        window.add(learner.step(batches, *rates))
                        run.step += 1
                        run.profiler.step()
                        bar.update()
                        if not (window.full or data.epoch_complete or (interrupt.signal and world.size == 1)):
                            continue

                        # The only place in an epoch where losses are fetched, for which the host waits for the device.
                        losses, signal = window.read(interrupt.signal)
                        run.log_losses(losses)
                        bar.set_postfix_str(progress(losses[-1], clock, data))
                        if data.epoch_complete:  # finish the epoch before stopping or saving
                            continue
                        if signal:
                            run.save()
                            return run.stop(signal)
                        run.save_if_due(len(losses))

                run.epoch += 1
                learned = run.mean_loss() | {"encoder/lr": rates[0]} | window.gauges() | throughput(clock, data)
                record = run.end_epoch(learned | {"training_time_hours": run.hours})
                run.print_advice(record, window.rows)
                if signal := max(world.gather(interrupt.signal)):
                    return run.stop(signal)
    return 0


def open_run(config: Config, world: World, resumed: Checkpoint | None, run_dir: Path) -> Run:
    """The run at its first step, or at the step of the checkpoint. Raises UserError where it cannot start."""
    shards = open_shards(config.data.shards)
    if resumed and resumed["shards"] != shards.fingerprint:
        raise UserError(
            f"the shards were packed again since {run_dir} began, so it cannot continue exactly: start a new run, or"
            " bring the old shards back"
        )
    # One that was asked for is kept, and that of a resumed run where there are as many processes as it was chosen for.
    keep = len(resumed["loaders"]) == world.size if resumed else config.train.micro_batch != "auto"
    config = micro_batch.choose_by_estimate(config, shards, world)
    learner = Learner(config, shards, world, pretrained=resumed is None)
    if world.device.type in micro_batch.TRIED_ON:
        config = micro_batch.choose_by_trial_step(config, learner, shards, world, keep)
    data = TrainingData.open(config, shards, world, resumed)
    return Run(data, learner, run_dir, resumed)


class LossWindow:
    """Losses of the latest steps, on the device until they are read together, and the outputs for the gauges."""

    def __init__(self, world: World, config: Config) -> None:
        self._world, self._log_every = world, config.train.log_every
        self._losses: list[Tensor] = []  # (loss, has_loss) of each step
        self._z: deque[Tensor] = deque(maxlen=max(1, GAUGE_ROWS // config.encoder.batch_size))

    @property
    def full(self) -> bool:
        """Whether `train.log_every` steps have been added since the last `read`."""
        return len(self._losses) >= self._log_every

    def add(self, scored: LossOutput) -> None:
        """Keep one step's result, without waiting for it."""
        self._losses.append(torch.stack([scored.loss, scored.has_loss]))
        self._z.append(scored.z)

    def read(self, signal: int) -> tuple[list[float | None], int]:
        """(each step's loss over all ranks, the largest signal any rank has received); all ranks must call it.

        A loss is None where no rank's batch had a positive pair.
        """
        ranks = self._world.gather((torch.stack(self._losses).tolist(), signal))
        self._losses.clear()
        steps = zip(*(losses for losses, _ in ranks), strict=True)
        return [mean_over_ranks(step) for step in steps], max(signal for _, signal in ranks)

    @property
    def rows(self) -> int:
        """On how many outputs the gauges are computed."""
        return sum(map(len, self._z))

    def gauges(self) -> dict[str, float]:
        """The collapse gauges of the latest outputs: this rank's or, where a loss compares those of all, all ranks'."""
        z = torch.cat(list(self._z))
        return {"encoder/z_std": float(z_std(z)), "encoder/effective_rank": float(effective_rank(z))}


def mean_over_ranks(ranks: Sequence[tuple[float, float]]) -> float | None:
    """One step's loss from each rank's (loss, has_loss); None where no rank had one."""
    losses = [loss for loss, has_loss in ranks if has_loss]
    return sum(losses) / len(losses) if losses else None


def throughput(clock: StepClock, data: TrainingData) -> dict[str, float]:
    """Segments a second, and the share of the time spent waiting for data, since the epoch began. Waits for the GPU."""
    seconds, waited = clock.read()
    segments = clock.steps * data.batch_size / data.micro_batches
    return {"throughput/samples_per_s": segments / seconds, "throughput/data_wait_share": waited}


def progress(loss: float | None, clock: StepClock, data: TrainingData) -> str:
    """The text behind the progress bar."""
    measured = throughput(clock, data)
    rate, waited = measured["throughput/samples_per_s"], measured["throughput/data_wait_share"]
    latest = "no positive pair" if loss is None else f"loss {loss:.4f}"
    return f"{latest}, {rate:.1f} samples/s, waiting for data {waited:.0%}"
