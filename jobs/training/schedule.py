"""The learning rate as a pure function of the step."""

import math

from moray.jobs.config.run import OptimizerSection


def learning_rate(step: int, steps: int, optimizer: OptimizerSection) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then cosine or warmup-stable-decay.

    Source: cosine, Loshchilov and Hutter, 2017; warmup-stable-decay, Hu et al., 2024 (MiniCPM).
    """
    highest, lowest = optimizer.lr, optimizer.lr * optimizer.min_lr_ratio
    if step < optimizer.warmup_steps:
        return highest * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "cosine":
        done = (step - optimizer.warmup_steps) / max(steps - optimizer.warmup_steps, 1)
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
    decay_steps = min(round(steps * optimizer.decay_fraction), steps - optimizer.warmup_steps)
    left = (steps - step) / max(decay_steps, 1)
    return lowest + (highest - lowest) * max(min(left, 1.0), 0.0)
