"""The training loop."""

from pathlib import Path

from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError
from simsiam_dali.common.signals import Interrupt
from simsiam_dali.config.schema import Config
from simsiam_dali.data.shards import open_shards
from simsiam_dali.training import checkpoint, micro_batch
from simsiam_dali.training.checkpoint import Checkpoint
from simsiam_dali.training.data import TrainingData
from simsiam_dali.training.learner import Learner, groups, learning_rates
from simsiam_dali.training.run import Run
from simsiam_dali.training.throughput import StepClock


def train(config: Config, world: World, resumed: Checkpoint | None, run_dir: Path) -> int:
    """Train until done or interrupted; returns the number of the signal that ended it, or 0."""
    with Interrupt() as interrupt:
        run = open_run(config, world, resumed, run_dir)
        config, data, learner, window = run.config, run.data, run.learner, run.window
        clock = StepClock(world.device)

        with run.recording():
            if not resumed:
                run.end_epoch({})  # the untrained encoder: what training has to beat
            elif run.epoch >= config.encoder.epochs:  # no other checkpoint will be saved
                record_place(run, resumed)
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


def record_place(run: Run, resumed: Checkpoint) -> None:
    """Write into the checkpoint of a complete run where its shards are now, for the commands that use it."""
    shards = run.config.data.shards
    if not run.world.main or str(shards) == resumed["config"]["data"]["shards"]:
        return
    try:
        checkpoint.move_shards(resumed, shards, run.run_dir / checkpoint.FILE_NAME)
    except UserError as e:
        run.world.print(f"warning: {e}: give --shards {shards} to embed, too")


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
