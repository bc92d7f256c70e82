"""The learning rate as a pure function of the step."""

import math

from moray.jobs.config.sections import OptimizerSection


def learning_rate(step: int, steps: int, optimizer: OptimizerSection) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then cosine or warmup-stable-decay.

    The last step has the lowest rate, lr * min_lr_ratio, unless none is left after the one that reaches the highest.
    Source: cosine, Loshchilov and Hutter, 2017; warmup-stable-decay, Hu et al., 2024 (MiniCPM).
    """
    highest, lowest = optimizer.lr, optimizer.lr * optimizer.min_lr_ratio
    if step < optimizer.warmup_steps:
        return highest * (step + 1) / optimizer.warmup_steps
    # From the step that reaches the highest rate to the last one, which has the lowest.
    peak, last = max(optimizer.warmup_steps - 1, 0), steps - 1
    if optimizer.schedule == "cosine":
        done = (step - peak) / max(last - peak, 1)
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
    decay_steps = min(max(round(steps * optimizer.decay_fraction), 1), last - peak)
    done = (step - (last - decay_steps)) / max(decay_steps, 1)
    return highest - (highest - lowest) * max(min(done, 1.0), 0.0)
