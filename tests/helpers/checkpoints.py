"""Checkpoints without a training."""

from typing import Any

import torch

from simsiam_dali.training import checkpoint


def state(step: int, numbers: int = 10) -> Any:
    """A checkpoint that holds every key; its weights are `step`, so that one tells from which save they are."""
    whole: dict[str, Any] = dict.fromkeys(checkpoint.Checkpoint.__required_keys__)
    weights = torch.full((numbers,), float(step))
    return whole | {"format_version": checkpoint.FORMAT_VERSION, "step": step, "learner": {"encoder": {"w": weights}}}
