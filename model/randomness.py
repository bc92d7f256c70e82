"""Random numbers as a function of (seed, step, global sequence, position): no layout and no micro-batch changes them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Randomness:
    """What a forward pass draws from. sequences_B: each row's index in the global order of the data (int64)."""

    seed: int
    step: int
    sequences_B: Tensor
