"""The critic's objective: of each token of an answer, what will have come of it in the end."""

# Shapes: B rows of T tokens.

from dataclasses import dataclass

import torch
from torch import Tensor

from moray.model.decoder import Decoder
from moray.model.loss import IGNORED
from moray.model.objective import MicroBatch, Objective


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) / 2 of each token.

    Source: as in OpenAI's baselines (ppo2) and verl's `compute_value_loss`; the papers have (v - R)^2 alone.
    """
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    return torch.max((values - returns).square(), (clipped - returns).square()) / 2


@dataclass(frozen=True, kw_only=True)
class ValueBatch(MicroBatch):
    """Packed samples, as a PolicyBatch has them: the value of what stands there before a target is drawn is learnt.

    old_values_BT: the critic's when the advantages were made; returns_BT: of `gae`; both 0 but at answers' tokens.
    weights_BT, n_own_count: `aggregation` of these samples.
    """

    old_values_BT: Tensor
    returns_BT: Tensor
    weights_BT: Tensor
    n_own_count: float


@dataclass(frozen=True)
class Value(Objective[ValueBatch]):
    """`value_loss`, aggregated by the batch's weights; clip=inf is the plain squared error.

    Beside it, means over all answers' tokens: `clipped`, the share whose gradient is cut; `value`; and `return`.
    """

    clip: float = 0.2
    names = ("loss", "clipped", "value", "return")

    def counts(self, piece: ValueBatch) -> tuple[float, ...]:
        return (piece.n_own_count, *[piece.n_targets] * 3)

    def sums(self, decoder: Decoder, piece: ValueBatch) -> tuple[Tensor, ...]:
        values = decoder.values(piece.tokens_BT, piece.positions_BT, piece.documents)
        losses = value_loss(values, piece.old_values_BT, piece.returns_BT, self.clip)
        answers, own = piece.targets_BT != IGNORED, values.detach()
        is_clipped = losses.detach() > (own - piece.returns_BT).square() / 2
        metrics = (is_clipped * answers, own * answers, piece.returns_BT)
        return tuple(x.sum(dtype=torch.float64) for x in (losses * piece.weights_BT, *metrics))
