"""How evenly tokens use the experts: what is counted while training, and the losses made of it."""

# Shapes: B sequences, T tokens of each on this rank, E experts, K experts per token, G routing groups: runs of
# `group_size` neighbouring sequences, D groups of neighbouring experts (the papers' devices).

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moray.model.config.moe import MoEConfig
from moray.model.moe.router import TINY, Routing


class Statistics(NamedTuple):
    """Sums over the valid tokens of each routing group in one MoE layer; None where no loss of the config needs them.

    tokens_G: 1. counts_GE: 1 for an expert that the token chose, whether or not it had room. firsts_GE: the same of
    the first choice alone. shares_GE: an expert's share of the token's scores. sent_GD: 1 for a group of experts that
    holds one the token chose. importance_GE: the gates. load_GE: the probability of being chosen. z_G1: the squared
    log-sum-exp of the router's logits.
    """

    tokens_G: Tensor
    counts_GE: Tensor
    shares_GE: Tensor
    firsts_GE: Tensor | None
    sent_GD: Tensor | None
    importance_GE: Tensor | None
    load_GE: Tensor | None
    z_G1: Tensor | None

    def total(self, add: Callable[..., tuple[Tensor, ...]]) -> "Statistics":
        """With `add`, a sum over the ranks that hold other tokens of the same groups, applied to all in one go."""
        found = iter(add(*(x for x in self if x is not None)))
        return Statistics._make(None if x is None else next(found) for x in self)


def statistics_of(routing: Routing, valid_BT: Tensor, moe: MoEConfig) -> Statistics:
    """Of this rank's tokens; valid_BT (bool) is False for padding."""
    chosen_BTK, scores_BTE = routing.chosen_BTK, routing.scores_BTE
    weight_BT1 = valid_BT[..., None].to(scores_BTE.dtype)
    taken_BTK = weight_BT1.expand(chosen_BTK.shape)
    if routing.drawn_BTK is not None:
        taken_BTK = taken_BTK * routing.drawn_BTK

    def summed(x_BTX: Tensor) -> Tensor:
        return (x_BTX * weight_BT1).unflatten(0, (-1, moe.group_size)).sum((1, 2))

    def gathered(x_BTK: Tensor, k: int = moe.top_k) -> Tensor:
        """Sums what belongs to the first k choices at their experts."""
        index_GA, x_GA = (t[..., :k].reshape(len(t) // moe.group_size, -1) for t in (chosen_BTK, x_BTK))
        return x_GA.new_zeros(len(x_GA), moe.n_experts).scatter_add(1, index_GA, x_GA)

    return Statistics(
        tokens_G=summed(torch.ones_like(weight_BT1)).squeeze(1),
        counts_GE=gathered(taken_BTK),
        shares_GE=summed(scores_BTE / (scores_BTE.sum(-1, keepdim=True) + TINY)),
        firsts_GE=gathered(taken_BTK, 1) if moe.balance_counts == "first" else None,
        sent_GD=summed(_reached(chosen_BTK, taken_BTK, moe)) if moe.communication_loss else None,
        importance_GE=gathered(routing.gates_BTK * taken_BTK) if moe.importance_loss else None,
        load_GE=summed(routing.load_BTE) if routing.load_BTE is not None else None,
        z_G1=summed(routing.z_BT1) if moe.router_z_loss else None,
    )


def _reached(chosen_BTK: Tensor, taken_BTK: Tensor, moe: MoEConfig) -> Tensor:
    """1 for each group of experts that a token has at least one expert in, [B, T, D]."""
    groups_BTK = chosen_BTK // (moe.n_experts // moe.n_groups)
    rows_BTD = taken_BTK.new_zeros(*chosen_BTK.shape[:2], moe.n_groups).scatter_add(-1, groups_BTK, taken_BTK)
    return rows_BTD.clamp(max=1)


def auxiliary_loss(layers: Sequence[Statistics], moe: MoEConfig) -> Tensor:
    """All auxiliary losses with their factors, summed over routing groups and MoE layers.

    Each loss of a group is a mean over its tokens. `balance_over=model` takes all layers' tokens together instead of
    summing over layers. `balance_loss` and `router_z_loss` say how they relate to the losses of transformers.
    """
    balanced = [_together(layers)] if moe.balance_over == "model" else layers
    losses = [moe.balance_loss * balance_loss(layer, moe) for layer in balanced if moe.balance_loss]
    others = (
        (moe.device_loss, device_loss),
        (moe.communication_loss, communication_loss),
        (moe.importance_loss, importance_loss),
        (moe.load_loss, load_loss),
        (moe.router_z_loss, router_z_loss),
    )
    losses += [factor * loss(layer, moe) for layer in layers for factor, loss in others if factor]
    return torch.stack(losses).sum() if losses else torch.zeros_like(layers[0].tokens_G[0])


def _together(layers: Sequence[Statistics]) -> Statistics:
    """As if all layers were one that sees the tokens of them all."""
    fields = zip(*layers, strict=True)
    return Statistics._make(None if parts[0] is None else torch.stack(parts).sum(0) for parts in fields)


def balance_loss(layer: Statistics, moe: MoEConfig) -> Tensor:
    """sum_i f_i P_i of each routing group, [G]: 1 when the tokens or the scores are spread evenly, E at collapse.

    Source: Fedus et al., 2021, eqs. 4-6 (with K = 1); DeepSeek-V2, eqs. 23-25; DeepSeek-V3, eqs. 17-20. GShard's
    algorithm 1 has 1 / E^2 times that of the first choices. transformers' Mixtral, Qwen and OLMoE sum f_i over the
    choices instead of averaging, and take all layers together: their coefficient c is
    `balance_loss = c * top_k, balance_over="model"`; its Switch is ours.
    """
    return (_frequencies(layer, moe) * _mean_shares(layer)).sum(-1)


def device_loss(layer: Statistics, moe: MoEConfig) -> Tensor:
    """Balance between groups of experts, [G]: 1 when even. Source: DeepSeek-V2, eqs. 26-28."""
    load_GD = _frequencies(layer, moe).unflatten(-1, (moe.n_groups, -1)).mean(-1)
    return (load_GD * _mean_shares(layer).unflatten(-1, (moe.n_groups, -1)).sum(-1)).sum(-1)


def communication_loss(layer: Statistics, moe: MoEConfig) -> Tensor:
    """Balance between the numbers of tokens that groups of experts receive, [G]. Source: DeepSeek-V2, eqs. 29-31."""
    assert layer.sent_GD is not None
    received_GD = layer.sent_GD * moe.n_groups / (moe.top_k_groups * _tokens(layer))
    return (received_GD * _mean_shares(layer).unflatten(-1, (moe.n_groups, -1)).sum(-1)).sum(-1)


def importance_loss(layer: Statistics, moe: MoEConfig) -> Tensor:
    """CV^2 of the experts' summed gates, [G]. Source: Shazeer et al., 2017, eqs. 6-7."""
    assert layer.importance_GE is not None
    return squared_variation(layer.importance_GE)


def load_loss(layer: Statistics, moe: MoEConfig) -> Tensor:
    """CV^2 of the experts' expected loads, [G]. Source: Shazeer et al., 2017, eqs. 10-11."""
    assert layer.load_GE is not None
    return squared_variation(layer.load_GE)


def router_z_loss(layer: Statistics, moe: MoEConfig) -> Tensor:
    """Mean squared log-sum-exp of the router's logits, [G]; transformers' of the same name is it too.

    Source: Zoph et al., 2022 (ST-MoE), eq. 5.
    """
    assert layer.z_G1 is not None
    return (layer.z_G1 / _tokens(layer)).squeeze(1)


def squared_variation(x_GE: Tensor) -> Tensor:
    """Variance over squared mean of each row, [G]; 0 for a row of zeros."""
    return x_GE.var(-1, correction=0) / (x_GE.mean(-1).square() + TINY)


def _frequencies(layer: Statistics, moe: MoEConfig) -> Tensor:
    """f_i: an expert's share of the choices, times their number, [G, E]: 1 when even."""
    if layer.firsts_GE is not None:
        return layer.firsts_GE * moe.n_experts / _tokens(layer)
    return layer.counts_GE * moe.n_experts / (moe.top_k * _tokens(layer))


def _mean_shares(layer: Statistics) -> Tensor:
    """P_i: an expert's mean share of the scores, [G, E]."""
    return layer.shares_GE / _tokens(layer)


def _tokens(layer: Statistics) -> Tensor:
    return layer.tokens_G[:, None].clamp(min=1)


def updated_bias(bias_E: Tensor, tokens_E: Tensor, moe: MoEConfig) -> Tensor:
    """The routing bias after one optimizer step: up for experts below the mean load, down for those above; and with
    `device_bias_update_rate`, the same for all experts of a group by the group's load.

    It stands still where all loads are even, and nowhere else if `bias_update_rate` is not 0: an expert's own step and
    its group's cancel only where one rate is the other, and even then not for all experts of a group, which are not all
    below the mean of a group above it. With a bias that moves by groups alone, it stands still where groups are even.
    `tokens_E` counts the whole global batch. Source: DeepSeek-V3, section 2.1.2; Wang et al., 2024, algorithm 1; the
    group's step is ours.
    """
    load_E = tokens_E.to(bias_E.dtype)
    load_D1 = load_E.view(moe.n_groups, -1).mean(-1, keepdim=True)
    by_expert_E, by_group_D1 = (load_E.mean() - load_E).sign(), (load_E.mean() - load_D1).sign()
    by_group_E = by_group_D1.expand(-1, moe.n_experts // moe.n_groups).flatten()
    return bias_E + moe.bias_update_rate * by_expert_E + moe.device_bias_update_rate * by_group_E
