"""The router: which experts a token passes, and how much each counts."""

# Shapes: B sequences, T tokens of each on this rank, D model width, E experts, K experts per token, g groups of e
# neighbouring experts.

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moray.model.config.architecture import ModelConfig
from moray.model.config.moe import MoEConfig
from moray.model.randomness import normal, uniform
from moray.model.recompute import cheap, once

TINY = 1e-20
"""Added to sums of scores that are divided by: sigmoids can underflow to 0, all of them."""

LEAST_DEVIATION = 1e-6
"""Of the noise on a logit, so that an expected load can be divided by it."""


class Routing(NamedTuple):
    """chosen_BTK: expert ids, best first (int64). gates_BTK: how much each counts. The rest is for statistics.

    scores_BTE: every expert's score. drawn_BTK (bool): False for a second expert that was not drawn, which counts as
    not chosen; None: nothing is drawn. load_BTE: the probability that an expert is chosen under another draw of its
    noise; None where no loss needs it. z_BT1: the squared log-sum-exp of the logits, noise included. All but ids and
    bools are at least fp32.
    """

    chosen_BTK: Tensor
    gates_BTK: Tensor
    scores_BTE: Tensor
    z_BT1: Tensor
    drawn_BTK: Tensor | None = None
    load_BTE: Tensor | None = None


class AccurateLinear(nn.Linear):
    """A linear map without bias, in fp32 at least, whatever the dtypes of its weight and its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(x.to(dtype), self.weight.to(dtype))


class Router(nn.Module):
    """Chooses K of E experts for each token and says how much each counts.

    Scores are fp32 whatever the model's dtype: in bf16, near-ties flip between layouts and break law 1. What is random
    is so in training alone.

    Shapes: x_BTD, keys_BT (of model.randomness; None where nothing is drawn), replayed_BTK (experts to choose whatever
    the scores; -1: by the scores) -> Routing.
    Source: DeepSeek-V3, section 2.1.2, eqs. 13-16; groups: DeepSeek-V2, section 2.2.2; noise: Shazeer et al., 2017,
    eqs. 3-5; jitter: Fedus et al., 2021, section 2.2; random second expert: Lepikhin et al., 2020, algorithm 1.
    """

    bias_E: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe
        self.moe = config.moe
        self.linear = AccurateLinear(config.d_model, config.n_experts)
        self.noise = AccurateLinear(config.d_model, config.n_experts) if config.moe.noisy else None
        self.register_buffer("bias_E", torch.zeros(config.n_experts))

    def forward(self, x_BTD: Tensor, keys_BT: Tensor | None = None, replayed_BTK: Tensor | None = None) -> Routing:
        moe = self.moe
        accurate = torch.promote_types(x_BTD.dtype, torch.float32)
        if x_BTD.dtype != accurate:
            x_BTD = cheap(lambda x: x.to(accurate), x_BTD)
        if moe.jitter and keys_BT is not None:
            spread_BTD = 2 * uniform(keys_BT, "jitter", x_BTD.shape[-1]) - 1
            x_BTD = x_BTD * (1 + moe.jitter * spread_BTD).to(x_BTD.dtype)
        clean_BTE = logits_BTE = self.linear(x_BTD)
        deviation_BTE = None
        if self.noise is not None and keys_BT is not None:
            deviation_BTE = F.softplus(self.noise(x_BTD)).clamp_min(LEAST_DEVIATION)
            drawn_BTE = normal(keys_BT, "noise", moe.n_experts).to(clean_BTE.dtype)
            logits_BTE = clean_BTE + drawn_BTE * deviation_BTE
        scores_BTE = logits_BTE.sigmoid() if moe.score == "sigmoid" else logits_BTE.softmax(-1)
        chosen_BTK, gates_BTK = choose(scores_BTE, self.bias_E, moe, replayed_BTK)
        drawn_BTK = None
        if moe.second_expert == "random" and keys_BT is not None:
            # With probability min(1, 2 gate), the gate being what it is before it is scaled.
            second_BT1 = once(lambda: uniform(keys_BT, "second expert", 1) < 2 * gates_BTK[..., 1:])
            drawn_BTK = torch.cat((torch.ones_like(second_BT1), second_BT1), dim=-1)
        load_BTE = None
        if moe.load_loss and deviation_BTE is not None:
            load_BTE = expected_load(clean_BTE, logits_BTE, deviation_BTE, moe.top_k)
        # Without a loss of it, a number to look at.
        z_BT1 = (logits_BTE if moe.router_z_loss else logits_BTE.detach()).logsumexp(-1, keepdim=True).square()
        return Routing(chosen_BTK, gates_BTK * moe.gate_scale, scores_BTE, z_BT1, drawn_BTK, load_BTE)


def choose(
    scores_BTE: Tensor, bias_E: Tensor, moe: MoEConfig, replayed_BTK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The K experts of the highest score and bias in the groups allowed, or those replayed, and their gates before they
    are scaled.
    """
    # The bias steers which experts are chosen, never how much they count (DeepSeek-V3, eq. 16).
    ranking_BTE = limit_to_groups(scores_BTE.detach() + bias_E, moe.n_groups, moe.top_k_groups, moe.group_score)
    chosen_BTK = once(lambda: ranking_BTE.topk(moe.top_k, dim=-1).indices)
    if replayed_BTK is not None:
        chosen_BTK = torch.where(replayed_BTK < 0, chosen_BTK, replayed_BTK)
    gates_BTK = scores_BTE.gather(-1, chosen_BTK)
    if moe.normalise_gates:
        gates_BTK = gates_BTK / (gates_BTK.sum(-1, keepdim=True) + TINY)
    return chosen_BTK, gates_BTK


def limit_to_groups(scores_BTE: Tensor, groups: int, top_k_groups: int, group_score: str) -> Tensor:
    """Hides (with -inf) the experts outside each token's best `top_k_groups` groups of neighbouring experts.

    A group is ranked by its best score (`max`, DeepSeek-V2) or the sum of its two best (`top2`, DeepSeek-V3).
    """
    if top_k_groups == groups:
        return scores_BTE
    scores_BTge = scores_BTE.unflatten(-1, (groups, -1))
    strength_BTg = scores_BTge.amax(-1) if group_score == "max" else scores_BTge.topk(2, dim=-1).values.sum(-1)
    kept = strength_BTg.topk(top_k_groups, dim=-1).indices
    hidden_BTg = torch.ones_like(strength_BTg, dtype=torch.bool).scatter(-1, kept, False)
    return scores_BTge.masked_fill(hidden_BTg[..., None], -torch.inf).flatten(-2)


def expected_load(clean_BTE: Tensor, noisy_BTE: Tensor, deviation_BTE: Tensor, k: int) -> Tensor:
    """The probability that an expert's noisy logit is among the k highest, were its own noise drawn again: [B, T, E].

    Source: Shazeer et al., 2017, eqs. 8-9.
    """
    highest = noisy_BTE.topk(k + 1, dim=-1).values
    kth, next_best = highest[..., k - 1 : k], highest[..., k:]
    # The k-th highest of the others: the next best one for those that are in.
    threshold_BTE = torch.where(noisy_BTE > next_best, next_best, kth)
    return 0.5 * (1 + torch.erf((clean_BTE - threshold_BTE) / (deviation_BTE * math.sqrt(2))))
