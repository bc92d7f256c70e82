"""Capacity: how many of a routing group's tokens an expert takes, and which assignments are dropped beyond it."""

# Shapes: B sequences of T tokens (whole ones), K experts per token, E experts, G routing groups: runs of `group_size`
# neighbouring sequences, A = group_size * T * K assignments of a group.

import math

import torch
from torch import Tensor

from moray.model.config.moe import MoEConfig

_GATE_BITS = 12


def capacity_of(moe: MoEConfig, tokens_G: Tensor) -> Tensor:
    """Most tokens that an expert takes of each group: ceil(factor * K * tokens / E) (int64).

    Source: Fedus et al., 2021, eq. 3; Lepikhin et al., 2020, section 3.2 (2N / (G E), which is factor 1 with K = 2).
    """
    assert moe.capacity_factor is not None
    return (moe.capacity_factor * moe.top_k * tokens_G.double() / moe.n_experts).ceil().long()


def most_of_expert(moe: MoEConfig, sequences: int, tokens: int) -> int:
    """As many tokens of so many sequences as an expert can take: what it takes where none of them is padding."""
    assert moe.capacity_factor is not None
    of_group = moe.capacity_factor * moe.top_k * (moe.group_size * tokens) / moe.n_experts
    return math.ceil(of_group) * (sequences // moe.group_size)


@torch.no_grad()
def within_capacity(chosen_BTK: Tensor, gates_BTK: Tensor, taken_BTK: Tensor, capacity_G: Tensor, by: str) -> Tensor:
    """Which assignments their experts have room for, [B, T, K] (bool); those not in taken_BTK (bool) need none.

    By `position`, room goes to all first choices in the order of the tokens, then to all second ones, as in GShard's
    algorithm 1 (there a second expert that is not drawn still uses up a place; here, as in GShard's and NLLB's code,
    it does not); by `gate`, to the largest gates, of those that agree to 12 bits by position. A dropped assignment adds
    nothing to its token, whose other gates stay as they are: Switch and GShard do the same, while NLLB may normalise a
    token's gates after dropping.
    """
    groups, (_, _, k) = len(capacity_G), chosen_BTK.shape
    expert_GA, gate_GA, taken_GA = (_by_choice(x, groups) for x in (chosen_BTK, gates_BTK, taken_BTK))
    # Those that need no room queue behind all experts, at a number of their own.
    expert_GA = expert_GA.masked_fill(~taken_GA, torch.iinfo(expert_GA.dtype).max)
    # Two stable sorts, the last by expert: queues, in which those with equal gates stand by position.
    queue_GA = _rounded(gate_GA).argsort(dim=1, descending=True, stable=True) if by == "gate" else None
    queued_GA = expert_GA if queue_GA is None else expert_GA.gather(1, queue_GA)
    expert_order_GA = queued_GA.argsort(dim=1, stable=True)
    order_GA = expert_order_GA if queue_GA is None else queue_GA.gather(1, expert_order_GA)
    sorted_GA = expert_GA.gather(1, order_GA)
    first_GA = torch.searchsorted(sorted_GA, sorted_GA)
    place_GA = torch.arange(sorted_GA.shape[1], device=sorted_GA.device) - first_GA
    room_GA = torch.empty_like(taken_GA).scatter_(1, order_GA, place_GA < capacity_G[:, None])
    kept_GA = room_GA & taken_GA
    return kept_GA.unflatten(1, (k, -1)).movedim(1, 2).reshape(chosen_BTK.shape)


def _rounded(gates: Tensor) -> Tensor:
    """To so many bits that gates which the mathematics makes equal are equal, however a layout rounded them.

    The first tokens of packed documents are often the same, and their gates then differ in the last bit or not at all.
    """
    mantissas, exponents = gates.frexp()
    return torch.ldexp((mantissas * 2**_GATE_BITS).round(), exponents)


def _by_choice(x_BTK: Tensor, groups: int) -> Tensor:
    """A group's assignments in a row, all first choices before the second ones. Shapes: [B, T, K] -> [G, A]."""
    return x_BTK.reshape(groups, -1, x_BTK.shape[2]).movedim(1, 2).flatten(1)
