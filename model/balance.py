"""How evenly tokens use the experts: what is counted while training, and the losses made of it."""

# Shapes: B sequences, T tokens of each on this rank, E experts, K experts per token, G routing groups: runs of
# `group_size` neighbouring sequences.

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from model.moe_config import MoEConfig

TINY = 1e-20
"""Added to sums of scores that are divided by: sigmoids can underflow to 0, all of them."""


class Statistics(NamedTuple):
    """Sums over the valid tokens of each routing group in one MoE layer.

    counts_GE: tokens that chose the expert. shares_GE: of the expert's share of each token's scores.
    tokens_G: valid tokens.
    """

    counts_GE: Tensor
    shares_GE: Tensor
    tokens_G: Tensor

    def total(self, add: Callable[[Tensor], Tensor]) -> Self:
        """With `add` applied to each: a sum over the ranks that hold other tokens of the same groups."""
        return type(self)(*(add(x) for x in self))


def statistics_of(chosen_BTK: Tensor, scores_BTE: Tensor, valid_BT: Tensor, group_size: int) -> Statistics:
    """Of this rank's tokens. Shapes: [B, T, K], [B, T, E], [B, T] (bool)."""
    n_groups, (_, _, n_experts) = len(valid_BT) // group_size, scores_BTE.shape
    weight_BT1 = valid_BT[..., None].to(scores_BTE.dtype)
    counts_GE = scores_BTE.new_zeros(n_groups, n_experts)
    counts_GE.scatter_add_(
        1, chosen_BTK.reshape(n_groups, -1), weight_BT1.expand_as(chosen_BTK).reshape(n_groups, -1)
    )
    shares_BTE = scores_BTE / (scores_BTE.sum(-1, keepdim=True) + TINY)
    shares_GE = (shares_BTE * weight_BT1).reshape(n_groups, -1, n_experts).sum(1)
    return Statistics(counts_GE, shares_GE, weight_BT1.reshape(n_groups, -1).sum(1))


def auxiliary_loss(layers: Sequence[Statistics], moe: MoEConfig) -> Tensor:
    """All auxiliary losses with their factors, summed over routing groups and MoE layers.

    Source: DeepSeek-V3, eqs. 17-20.
    """
    total = torch.zeros_like(layers[0].tokens_G.sum())
    for counts_GE, shares_GE, tokens_G in layers:
        tokens_G1 = tokens_G[:, None].clamp(min=1)
        frequency_GE = counts_GE * moe.n_experts / (moe.top_k * tokens_G1)
        total = total + moe.balance_loss * (frequency_GE * shares_GE / tokens_G1).sum()
    return total
