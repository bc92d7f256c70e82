"""What the tokens of a step's answers are worth, from their rewards: the same on every rank. GRPO and PPO differ here.

GRPO compares an answer with others to its prompt; PPO asks a critic, whose values `gae` puts between a token and what
came of it, with the KL divergence from the reference as a reward of each token's own.
"""

# Shapes: S samples, T tokens of the longest answer, P prompts, G answers to each.

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moray.jobs.alignment.observed import Minibatch, Observed
from moray.jobs.config.alignment import RLSection
from moray.model.alignment.advantages import gae, group_advantages, token_rewards, whiten
from moray.parallel.control_plane import ControlPlane

Seen = Sequence[tuple[Minibatch, Sequence[Observed]]]
"""Each minibatch of a step, and this rank's micro-batches of it."""


class Worth(NamedTuple):
    """Of each token of each answer (fp64, 0 behind an answer's end): its advantage and, for a critic, what its value
    should have been. teaches_S (bool): from which there is anything to learn. told: what the step's row says of it.
    """

    advantages_ST: Tensor
    returns_ST: Tensor | None
    teaches_S: Tensor
    told: dict[str, float]


def by_comparison(
    rl: RLSection, totals_S: Tensor, lengths_S: Tensor, is_valid_S: Tensor, seen: Seen, ranks: ControlPlane
) -> Worth:
    """GRPO's. A prompt whose answers are all worth the same teaches nothing but the KL divergence."""
    deviation = None if rl.variant == "dr_grpo" else rl.deviation
    rewards_PG = totals_S.view(-1, rl.group_size)
    advantages_PG, n_dead = group_advantages(rewards_PG, deviation, rl.deviation_epsilon)
    advantages_ST = advantages_PG.view(-1, 1) * _mask(lengths_S)
    teaches_S = advantages_ST.any(1) | (rl.kl_coefficient > 0)
    return Worth(advantages_ST, None, teaches_S, {"dead_groups": n_dead})


def by_critic(
    rl: RLSection, totals_S: Tensor, lengths_S: Tensor, is_valid_S: Tensor, seen: Seen, ranks: ControlPlane
) -> Worth:
    """PPO's. Collective. told: `kl`, the mean k1 of all tokens, and the explained variance of the returns."""
    logp_ST, reference_logp_ST, values_ST = _of_all_ranks(lengths_S, seen, ranks)
    mask_ST = _mask(lengths_S)
    rewards_ST = token_rewards(totals_S, logp_ST, reference_logp_ST, mask_ST, rl.kl_coefficient)
    advantages_ST, returns_ST = gae(rewards_ST, values_ST, mask_ST, rl.discount, rl.gae_decay)
    held, returns = mask_ST & is_valid_S[:, None], returns_ST[mask_ST]
    if rl.whiten and held.any():
        advantages_ST = whiten(advantages_ST, held)
    unexplained, variance = (returns - values_ST[mask_ST]).var(correction=0), returns.var(correction=0)
    told = {
        "kl": float((logp_ST - reference_logp_ST)[mask_ST].mean()),
        "explained_variance": float(1 - unexplained / variance) if variance > 0 else 0.0,
    }
    return Worth(advantages_ST, returns_ST, torch.ones_like(is_valid_S), told)


WORTH = {"grpo": by_comparison, "ppo": by_critic}
"""By train.objective."""


def _mask(lengths_S: Tensor) -> Tensor:
    return torch.arange(int(lengths_S.max())) < lengths_S[:, None]


def _of_all_ranks(lengths_S: Tensor, seen: Seen, ranks: ControlPlane) -> Tensor:
    """Log-probabilities of policy and reference, and values, of all tokens of all samples, [3, S, T]. Without a
    reference, its are the policy's.
    """
    own: dict[int, np.ndarray] = {}
    for part, pieces in seen:
        for one in pieces:
            reference_BT = one.logp_BT if one.reference_logp_BT is None else one.reference_logp_BT
            assert one.values_BT is not None
            known_3BT = torch.stack([x.double().cpu() for x in (one.logp_BT, reference_BT, one.values_BT)])
            for at in part.rows.samples_in(one.piece):
                row, here = part.rows.places[at]
                own[part.samples[at]] = known_3BT[:, row - one.piece.start, here].numpy()
    whole_3ST = torch.zeros(3, len(lengths_S), int(lengths_S.max()), dtype=torch.float64)
    for of_rank in ranks.gather(own):
        for sample, known_3T in of_rank.items():
            whole_3ST[:, sample, : known_3T.shape[1]] = torch.from_numpy(known_3T)
    return whole_3ST
