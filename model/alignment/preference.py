"""Preferences: over a reference, the chosen answer is to gain more probability than the rejected one."""

# Shapes: P pairs, 2 sides of each (chosen, rejected); R rows of T tokens.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moray.model.alignment.pairs import PairBatch
from moray.model.decoder import Decoder
from moray.model.loss import IGNORED
from moray.model.objective import Objective

Kind = Literal["dpo", "ipo"]


def dpo_loss(margins_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta m), of m = (log p - log p_ref of the chosen answer) - (the same of the rejected one).

    With label smoothing e, for labels that are wrong with this probability: (1 - e) of that, and e of it for -m.
    Sources: Rafailov et al., 2023, eq. 7; Mitchell, "A note on DPO with noisy preferences", 2023, eq. 3.
    """
    right_P, wrong_P = -F.logsigmoid(beta * margins_P), -F.logsigmoid(-beta * margins_P)
    return (1 - label_smoothing) * right_P + label_smoothing * wrong_P


def ipo_loss(margins_P: Tensor, beta: float) -> Tensor:
    """(m - 1 / (2 beta))^2. Source: Azar et al., 2023, eq. 17, whose tau is beta."""
    return (margins_P - 1 / (2 * beta)).square()


@dataclass(frozen=True)
class Preference(Objective[PairBatch]):
    """DPO or IPO, a mean over pairs; a side's log-probability is the sum over the tokens of its answer.

    reference: frozen, of the same tokens. length_normalised: IPO's sums are means over the answer's tokens, as TRL has
    it; the equation has sums. Beside the loss, which alone has a gradient: `margin`, beta m; `accuracy`, the share of
    pairs with m > 0, of which ties are none; each side's log-probability; and `kl`, the mean over answers' tokens of
    k3 (Schulman, 2020): never negative, and not the KL divergence itself, as the policy did not write these tokens.
    """

    reference: Decoder
    kind: Kind = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalised: bool = False
    names = ("loss", "margin", "accuracy", "chosen_logp", "rejected_logp", "kl")
    held_out = ("loss", "margin", "accuracy")

    def counts(self, piece: PairBatch) -> Sequence[float]:
        return (*[piece.n_pairs] * 5, piece.n_targets)

    def sums(self, decoder: Decoder, piece: PairBatch) -> Sequence[Tensor]:
        inputs = (piece.tokens_BT, piece.targets_BT, piece.positions_BT, piece.documents)
        with torch.no_grad():
            reference_RT = self.reference.logprobs(*inputs)
        logp_RT = decoder.logprobs(*inputs)
        # Of each token first: where the two models are one, differences are exactly 0.
        ratio_RT = logp_RT - reference_RT
        gains_P2 = piece.per_side(ratio_RT)
        if self.length_normalised:
            gains_P2 = gains_P2 / piece.per_side(piece.targets_BT != IGNORED)
        margins_P = gains_P2[:, 0] - gains_P2[:, 1]
        if self.kind == "dpo":
            losses_P = dpo_loss(margins_P, self.beta, self.label_smoothing)
        else:
            losses_P = ipo_loss(margins_P, self.beta)
        margins_P, ratio_RT, logp_P2 = margins_P.detach(), ratio_RT.detach(), piece.per_side(logp_RT.detach())
        k3 = (torch.expm1(-ratio_RT) + ratio_RT).sum(dtype=torch.float64)
        metrics = (self.beta * margins_P.sum(), (margins_P > 0).sum(dtype=torch.float64), *logp_P2.sum(0), k3)
        return losses_P.sum(), *metrics
