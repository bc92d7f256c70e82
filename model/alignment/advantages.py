"""What the tokens of answers are worth, from rewards: GRPO's comparison within a group, and PPO's estimate over values.

All samples of a step go in at once, the same ones on every rank, and nothing that comes out has a gradient.
"""

# Shapes: P prompts, G answers to each, S samples, T tokens of the longest answer.

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moray import UserError

Deviation = Literal["sample", "population"]
"""Divided by n - 1 (Bessel) or by n, under the root."""


class GroupAdvantages(NamedTuple):
    """Of each answer, [P, G]; n_dead: how many prompts teach nothing, as all their answers are worth the same."""

    advantages_PG: Tensor
    n_dead: int


def group_advantages(
    rewards_PG: Tensor, deviation: Deviation | None = "sample", epsilon: float = 1e-4
) -> GroupAdvantages:
    """(reward - mean) / (deviation + epsilon) within each prompt's answers; exactly 0 in a dead group.

    deviation: TRL and verl take the sample's, MiniMind the population's; None divides by nothing (Dr. GRPO,
    arXiv 2503.20783). epsilon: 1e-4 in TRL and MiniMind, 1e-6 in verl. Raises UserError of groups of one and of
    rewards that aren't finite. Source: DeepSeekMath, section 4.1.2; DeepSeek-R1, eq. 3.
    """
    if (size := rewards_PG.shape[1]) < 2:
        raise UserError(f"group_size={size}: an answer is compared with others to its prompt; it must be at least 2")
    _refuse_non_finite(rewards_PG.flatten())
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if deviation is not None:
        correction = 1 if deviation == "sample" else 0
        centred_PG = centred_PG / (rewards_PG.std(1, keepdim=True, correction=correction) + epsilon)
    # The mean of equal numbers is not always that number, and the rounding would be divided by next to nothing.
    dead_P1 = (rewards_PG == rewards_PG[:, :1]).all(1, keepdim=True)
    return GroupAdvantages(centred_PG.masked_fill(dead_P1, 0.0), int(dead_P1.sum()))


def token_rewards(
    scores_S: Tensor, logp_ST: Tensor, reference_logp_ST: Tensor, mask_ST: Tensor, kl_coefficient: float
) -> Tensor:
    """PPO's reward of each token, [S, T]: -kl_coefficient * k1, and at an answer's last token its score as well.

    mask_ST (bool): the tokens of answers; whatever is not has reward 0. logp_ST: of the policy that wrote them.
    Raises UserError of scores that aren't finite. Source: DeepSeekMath, eq. 2; Ziegler et al., 2019, eq. 2.
    """
    _refuse_non_finite(scores_S)
    place_T = torch.arange(mask_ST.shape[1], device=mask_ST.device)
    last_S1 = torch.where(mask_ST, place_T, -1).amax(1, keepdim=True)
    is_last_ST = mask_ST & (place_T == last_S1)
    rewards_ST = -kl_coefficient * (logp_ST - reference_logp_ST) + scores_S[:, None] * is_last_ST
    return torch.where(mask_ST, rewards_ST, 0.0)


class Estimates(NamedTuple):
    """Of each token, [S, T], 0 where masked: its advantage, and the return that its value should have been."""

    advantages_ST: Tensor
    returns_ST: Tensor


def gae(
    rewards_ST: Tensor, values_ST: Tensor, mask_ST: Tensor, discount: float = 1.0, decay: float = 0.95
) -> Estimates:
    """The sum over k of (discount * decay)^k delta_{t+k}, delta_t = reward_t + discount * value_{t+1} - value_t.

    values_ST: of the state before a token is written. mask_ST (bool): what is not of an answer, behind it or within it,
    is as if it were not there: no reward, no delta, no decay. Behind the last token the value is 0. The returns are
    advantages + values. Source: Schulman et al., 2016, eq. 16 (gamma is the discount, lambda the decay).
    """
    next_value_S = advantage_S = torch.zeros_like(values_ST[:, 0])
    advantages_ST, returns_ST = torch.zeros_like(values_ST), torch.zeros_like(values_ST)
    for t in reversed(range(values_ST.shape[1])):
        is_real_S, value_S = mask_ST[:, t], values_ST[:, t]
        delta_S = rewards_ST[:, t] + discount * next_value_S - value_S
        advantage_S = torch.where(is_real_S, delta_S + discount * decay * advantage_S, advantage_S)
        next_value_S = torch.where(is_real_S, value_S, next_value_S)
        advantages_ST[:, t] = advantage_S
        returns_ST[:, t] = advantage_S + value_S
    return Estimates(torch.where(mask_ST, advantages_ST, 0.0), torch.where(mask_ST, returns_ST, 0.0))


def whiten(x_ST: Tensor, mask_ST: Tensor, deviation: Deviation = "sample", epsilon: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) over all that the mask (bool) holds, 0 elsewhere.

    The variance is verl's with "sample", MiniMind's with "population". A single token has no variance: it becomes 0.
    """
    held = x_ST[mask_ST]
    variance = held.var(correction=1 if deviation == "sample" and len(held) > 1 else 0)
    return torch.where(mask_ST, (x_ST - held.mean()) * torch.rsqrt(variance + epsilon), 0.0)


def _refuse_non_finite(rewards_S: Tensor) -> None:
    wrong = (~rewards_S.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise UserError(f"the reward of sample {wrong[0]} is {rewards_S[wrong[0]].item()}; it must be a finite number")
