"""What the loop keeps of its latest steps: losses, until they are fetched, and outputs for the collapse gauges."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from simsiam_dali.common.distributed import World
from simsiam_dali.config.schema import Config
from simsiam_dali.models.encoder import LossOutput
from simsiam_dali.training.collapse import effective_rank, z_std

GAUGE_ROWS = 1024
"""Outputs, of the latest batches, on which the collapse gauges are computed."""


class LossWindow:
    """Losses of the latest steps, on the device until they are read together, and the outputs for the gauges."""

    def __init__(self, world: World, config: Config) -> None:
        self._world, self._log_every = world, config.train.log_every
        self._losses: list[Tensor] = []  # (loss, has_loss) of each step
        self._z: deque[Tensor] = deque(maxlen=max(1, GAUGE_ROWS // config.encoder.batch_size))

    def outputs(self) -> list[Tensor]:
        """The latest outputs, for a checkpoint: a resumed run has the gauges of one that never stopped."""
        return [z.cpu().clone() for z in self._z]  # a view would be saved with all that it is a view of

    def restore(self, outputs: Sequence[Tensor]) -> None:
        """Take those of a checkpoint."""
        self._z.extend(z.to(self._world.device) for z in outputs)

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
