"""Resume with another number of processes than the checkpoint was saved by.

The segments in a step, over all processes, stay the same, and with them the steps an epoch, the learning rate and the
momentum; `encoder.batch_size`, which is per process, changes instead. A process's position in the data and its random
state cannot be passed on, so the epoch restarts, with the weights as they are, in an order and with draws that the run
has not used yet. Whole epochs stay as they are. Batch-norm statistics are over each process's own segments, so they
change, unless `train.sync_bn` is on.
"""

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import replace_settings
from simsiam_dali.config.schema import Config
from simsiam_dali.data.augment import derive_seed
from simsiam_dali.models.registry import encoder_type


def rescale_batch_size(config: Config, before: int, now: int) -> Config:
    """The settings of a run of `before` processes, for `now`. Raises UserError where that is impossible."""
    segments = config.encoder.batch_size * before
    if segments % now or segments < 2 * now:
        possible = [str(n) for n in range(1, segments // 2 + 1) if segments % n == 0]
        raise UserError(
            f"a step of this run has {segments} segments, which {now} processes cannot share evenly, 2 or more each:"
            f" continue with {', '.join(possible)}"
        )
    size = segments // now
    micro_batch = config.train.micro_batch
    if micro_batch != "auto":
        micro_batch = size if encoder_type(config).is_contrastive else _largest_divisor(micro_batch, size)
    return replace_settings(config, encoder__batch_size=size, train__micro_batch=micro_batch)


def _largest_divisor(micro_batch: int, size: int) -> int:
    """The largest divisor of `size`, from 2 on, that is no larger than the micro-batch was; `size` without one."""
    return max((n for n in range(2, micro_batch + 1) if size % n == 0), default=size)


def order_seed(config: Config, step: int, now: int) -> int:
    """Seed of the order and the draws of a run that continued with `now` processes after `step`."""
    return derive_seed(config.train.seed, f"step {step}, {now} processes")


def began_again(config: Config, step: int, epoch: int, before: int, now: int) -> str:
    """A line for a run that was saved by another number of processes, and goes on at the start of its epoch."""
    return (
        f"saved after step {step} by {before} processes, now {now} with {config.encoder.batch_size} segments a step"
        f" each: epoch {epoch + 1} from its start, in a new order"
    )
