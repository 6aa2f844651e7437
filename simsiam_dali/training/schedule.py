"""The learning rate as a function of the step, so that a resumed run needs no state for it."""

import math

from simsiam_dali.config.schema import Config
from simsiam_dali.models.registry import encoder_type


def learning_rates(config: Config, step: int, steps_per_epoch: int, batch: int) -> tuple[float, float]:
    """(the encoder's rate, the rate of groups marked `fix_lr`) at optimizer step `step`.

    A linear warm-up to the base rate, then half a cosine to 0; `fix_lr` groups stay at the base rate (arXiv:2011.10566,
    section 4.2). The base rate is the configured one x batch / 256 for SGD (section 4.1 there), and as it is for AdamW,
    whose steps do not grow with the gradient. batch: segments a step over all processes.
    """
    rule = encoder_type(config).settings(config)
    base = config.encoder.learning_rate or rule.learning_rate
    if rule.optimizer == "sgd":
        base *= batch / 256
    warmup = rule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return base * (step + 1) / (warmup + 1), base
    done = (step - warmup) / max(1.0, config.encoder.epochs * steps_per_epoch - warmup)
    return base * 0.5 * (1 + math.cos(math.pi * done)), base
