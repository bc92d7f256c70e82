"""The policy's objective: answers that were worth more than expected gain probability. GRPO, its variants, and PPO."""

# Shapes: B rows of T tokens, S samples (a prompt with its answer) packed into the rows of a step.

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moray import UserError
from moray.model.alignment.kl import KLEstimator, kl_estimate, kl_term
from moray.model.context import Routes
from moray.model.decoder import Decoder
from moray.model.loss import IGNORED
from moray.model.objective import MicroBatch, Objective

Aggregation = Literal["grpo", "dapo", "dr_grpo"]
Surrogate = Literal["clip", "cispo"]


def aggregation(kind: Aggregation, lengths_S: Tensor, is_valid_S: Tensor, max_new_tokens: int) -> tuple[Tensor, float]:
    """What each token of a sample's answer weighs in the loss, [S] (fp64), and what the samples add to its denominator.

    grpo: the mean over samples of means over tokens (DeepSeekMath, eq. 3); dapo: the mean over all tokens (DAPO, eq.
    12; TRL's and verl's default); dr_grpo: the sum over tokens, by samples * max_new_tokens (arXiv 2503.20783). What
    parts of a batch add is what the whole does. A sample that isn't valid (over-long, say) is in neither, where TRL
    leaves it in the denominators of grpo and dr_grpo. lengths_S (int64): tokens of each answer; is_valid_S: bool.
    """
    weight_S, tokens_S = is_valid_S.double(), lengths_S * is_valid_S
    if kind == "dapo":
        return weight_S, float(tokens_S.sum())
    if kind == "dr_grpo":
        return weight_S, float(is_valid_S.sum() * max_new_tokens)
    return weight_S / lengths_S.clamp(min=1), float(is_valid_S.sum())


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) of each token.

    Sources: Schulman et al., 2017, eq. 7; of a higher upper bound ("clip-higher"), DAPO, eq. 10.
    """
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def cispo_surrogate(logp: Tensor, ratio: Tensor, advantages: Tensor, clip_high: float) -> Tensor:
    """-min(ratio, 1 + clip_high) A log p of each token, with the gradient of log p alone: no token loses it.

    Source: MiniMax-M1, eqs. 4 and 5, without its lower bound, as there. TRL and MiniMind cap the ratio at their
    `epsilon_high` itself: their 5.0 is 4.0 here.
    """
    return -ratio.detach().clamp(max=1 + clip_high) * advantages * logp


@dataclass(frozen=True, kw_only=True)
class PolicyBatch(MicroBatch):
    """Packed samples, each whole in one row. A token stands where it is the target, a place before its own.

    targets_BT is IGNORED except at answers' tokens, where old_logp_BT is the log-probability under the policy that drew
    them (at the sampling temperature), reference_logp_BT that under the reference, or None without one, and
    advantages_BT what they are worth; all are 0 elsewhere. weights_BT, n_own_count: `aggregation` of these samples.
    routes: experts that tokens are to pass again.
    """

    old_logp_BT: Tensor
    advantages_BT: Tensor
    reference_logp_BT: Tensor | None
    weights_BT: Tensor
    n_own_count: float
    n_samples: int
    routes: Routes | None = None


@dataclass(frozen=True)
class Policy(Objective[PolicyBatch]):
    """The surrogate of each token plus kl_coefficient times its `kl_term`, aggregated by the batch's weights.

    GRPO (DeepSeekMath, eqs. 3 and 4; DeepSeek-R1, eqs. 1 to 3) is the default with a kl_coefficient; PPO has advantages
    by `gae` and its KL in the rewards. temperature: that at which answers were drawn. kl_correction=False takes
    `kl_estimate` for `kl_term`: the published GRPO with k3, whose gradient is biased.

    Beside the loss, means over all answers' tokens: `clipped_low` and `clipped_high`, shares whose gradient (with
    CISPO, weight) a bound has cut; `ratio`, to the old policy; `kl_old`, k3 of the old policy from this one; `kl`, the
    term itself, without its coefficient (0 without a reference); `entropy`, estimated by -log p.
    """

    temperature: float = 1.0
    surrogate: Surrogate = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_correction: bool = True
    names = ("loss", "clipped_low", "clipped_high", "ratio", "kl_old", "kl", "entropy")

    def __post_init__(self) -> None:
        if self.kl_estimator == "k1" and not self.kl_correction:
            raise UserError(
                "kl_correction=false with kl_estimator=k1: the gradient would not know of the reference; "
                "set kl_correction=true, or kl_estimator to k2 or k3"
            )

    def counts(self, piece: PolicyBatch) -> tuple[float, ...]:
        return (piece.n_own_count, *[piece.n_targets] * 6)

    def sums(self, decoder: Decoder, piece: PolicyBatch) -> tuple[Tensor, ...]:
        logp = decoder.logprobs(
            piece.tokens_BT, piece.targets_BT, piece.positions_BT, piece.documents, self.temperature, piece.routes
        )
        log_ratio, advantages = logp - piece.old_logp_BT, piece.advantages_BT
        ratio = log_ratio.exp()
        if self.surrogate == "cispo":
            losses = cispo_surrogate(logp, ratio, advantages, self.clip_high)
            low, high = torch.zeros_like(ratio), ratio > 1 + self.clip_high
        else:
            losses = clipped_surrogate(ratio, advantages, self.clip_low, self.clip_high)
            low = (ratio < 1 - self.clip_low) & (advantages < 0)
            high = (ratio > 1 + self.clip_high) & (advantages > 0)
        kl = torch.zeros_like(ratio)
        if piece.reference_logp_BT is not None:
            kl = self._kl(logp, piece.old_logp_BT, piece.reference_logp_BT)
            losses = losses + self.kl_coefficient * kl
        answers = piece.targets_BT != IGNORED
        kl_old = torch.expm1(log_ratio) - log_ratio
        metrics = (low, high, ratio, kl_old, kl, -logp)
        return _total(losses * piece.weights_BT), *(_total(x.detach() * answers) for x in metrics)

    def _kl(self, logp: Tensor, old_logp: Tensor, reference_logp: Tensor) -> Tensor:
        if self.kl_correction:
            return kl_term(logp, old_logp, reference_logp, self.kl_estimator)
        return kl_estimate(logp, reference_logp, self.kl_estimator)


def _total(x_BT: Tensor) -> Tensor:
    return x_BT.sum(dtype=torch.float64)
