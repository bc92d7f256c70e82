"""What a batch asks of a model, in floating-point operations: real tokens alone, and attention within documents."""

# Shapes: B rows, T tokens of each.

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from moray.model.accounting.cost import (
    SCORES,
    attention_reaches,
    count_adapters,
    forward_flops,
    pair_flops,
    seen_pairs,
)
from moray.model.config.architecture import ModelConfig
from moray.model.lora import LoRA

BACKWARD_AND_FORWARD = 3  # a backward pass costs two forward ones


@dataclass(frozen=True)
class Work:
    """Floating-point operations of forward and backward, as `cost.py` counts them.

    per_token: of everything but attention scores. per_pair: of a query and a key that it sees, in one layer.
    reaches: of each layer, how many tokens a token sees at most, itself among them; None for all before it.
    """

    per_token: float
    per_pair: float
    reaches: tuple[int | None, ...]

    @classmethod
    def of(cls, config: ModelConfig, lora: LoRA | None = None) -> Self:
        flops = forward_flops(config, 1)
        products = sum(value for part, value in flops.items() if part != SCORES)
        per_token = BACKWARD_AND_FORWARD * products
        if lora:  # no gradient is formed of what is frozen
            per_token = 2 * products + BACKWARD_AND_FORWARD * 2 * count_adapters(config, lora).active
        return cls(per_token, BACKWARD_AND_FORWARD * pair_flops(config), attention_reaches(config))

    def flops(self, documents_BT: Tensor) -> float:
        """Of a packed batch, from each token's document id; -1 is padding, which asks for nothing."""
        rows, width = documents_BT.shape
        starts = torch.ones(rows, width, dtype=torch.bool)
        starts[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        edges = starts.flatten().nonzero().flatten()
        lengths = torch.diff(edges, append=torch.tensor([rows * width]))
        lengths = lengths[documents_BT.flatten()[edges] >= 0]
        pairs = {reach: seen_pairs(lengths, reach) for reach in set(self.reaches)}
        return self.per_token * int(lengths.sum()) + self.per_pair * sum(pairs[reach] for reach in self.reaches)
