"""The learning rate as a function of the step, so that a resumed run needs no state for it."""

import math

from simsiam_dali.config import Config


def learning_rates(config: Config, step: int, steps_per_epoch: int, batch: int) -> tuple[float, float]:
    """(the encoder's rate, the rate of groups marked `fix_lr`) at optimizer step `step`.

    lr = learning_rate x batch / 256, a linear warm-up, then half a cosine to 0; the predictor's stays (section 4.2).
    batch: segments a step over all processes.
    """
    base = config.encoder.learning_rate * batch / 256
    warmup = config.encoder.simsiam.warmup_epochs * steps_per_epoch
    if step < warmup:
        return base * (step + 1) / (warmup + 1), base
    done = (step - warmup) / max(1.0, config.encoder.epochs * steps_per_epoch - warmup)
    return base * 0.5 * (1 + math.cos(math.pi * done)), base
