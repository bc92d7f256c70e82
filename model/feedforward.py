"""The dense feed-forward network."""

# Shapes: B sequences, T tokens of each, D model width, F hidden width.

import torch.nn.functional as F
from torch import Tensor, nn

from model.context import Context
from model.parts import FeedForwardConfig


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x)), or without a gate down(act(up(x))). Shapes: [B, T, D] -> [B, T, D].

    Source: Shazeer, 2020.
    """

    def __init__(self, d_model: int, width: int, config: FeedForwardConfig, layer: int | None = None) -> None:
        """`layer`: the decoder layer whose dense network this is; None for shared experts, which mix no tokens."""
        super().__init__()
        self.gate = nn.Linear(d_model, width, bias=False)
        self.up = nn.Linear(d_model, width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))
