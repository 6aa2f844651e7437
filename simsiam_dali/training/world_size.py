"""Going on with another number of processes than a checkpoint was saved by: the rule.

A step stays a step: all processes together take as many segments as before, so that steps an epoch, learning rate (a
function of the step and its segments) and momentum go on as they were; `encoder.batch_size`, which is for each process,
changes instead. What belonged to one process cannot be handed on: its place in the data and its random draws. So the
epoch that was begun begins again, with the weights as they have become, in an order and with draws that the run has not
had yet. Whole epochs stay as they are. Batch norm's statistics are of each process's own segments, so they are
what changes, unless `train.sync_bn` is on.
"""

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import replace_settings
from simsiam_dali.config.schema import Config
from simsiam_dali.data.augment import derive_seed


def shared_anew(config: Config, before: int, now: int) -> Config:
    """The settings of a run of `before` processes, for `now`. Raises UserError where a step cannot be shared evenly."""
    segments = config.encoder.batch_size * before
    if segments % now or segments < 2 * now:
        possible = [str(n) for n in range(1, segments // 2 + 1) if segments % n == 0]
        raise UserError(
            f"a step of this run has {segments} segments, which {now} processes cannot share evenly, 2 or more each: go"
            f" on with {', '.join(possible)}"
        )
    size = segments // now
    micro_batch = _shared(config.train.micro_batch, size)
    return replace_settings(config, encoder__batch_size=size, train__micro_batch=micro_batch)


def _shared(micro_batch: int | str, size: int) -> int | str:
    """The micro-batch of a step that has `size` segments a process now: no larger than it was, and a divisor."""
    if micro_batch == "auto":
        return micro_batch
    return max(n for n in range(1, size + 1) if size % n == 0 and n <= int(micro_batch))


def order_seed(config: Config, step: int, now: int) -> int:
    """Seed of the order and the draws of a run that went on with `now` processes after `step`."""
    return derive_seed(config.train.seed, f"step {step}, {now} processes")
