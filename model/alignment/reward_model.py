"""A reward model: a decoder with a scalar head learns which of two answers people prefer."""

# Shapes: B rows of T tokens, P pairs; of each pair, the chosen answer is first and the rejected one second.

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from moray.model.alignment.pairs import PairBatch
from moray.model.decoder import Decoder
from moray.model.objective import Objective


@dataclass(frozen=True)
class RewardModel(Objective[PairBatch]):
    """`bradley_terry` a pair, and `centring` times the squared sum of a pair's scores, which keeps them around 0.

    Ties count as mistakes in the accuracy. least_margin: how far apart the scores shall be; the metric `margin` is how
    far they are.
    Source: of the centring, Eisenstein et al., 2023 (`center_rewards_coefficient` in TRL).
    """

    centring: float = 0.0
    least_margin: float = 0.0
    held_out = ("loss", "accuracy", "margin")
    names = ("loss", "centring", "accuracy", "margin", "chosen_score", "rejected_score")

    def counts(self, piece: PairBatch) -> tuple[float, ...]:
        return (piece.n_pairs,) * len(self.names)

    def sums(self, decoder: Decoder, piece: PairBatch) -> tuple[Tensor, ...]:
        scores_BT = decoder.values(piece.tokens_BT, piece.positions_BT, piece.documents)
        scores_P2 = scores_BT.flatten()[piece.last_P2]
        chosen_P, rejected_P = scores_P2.detach().unbind(1)
        apart_P = chosen_P - rejected_P
        return (
            bradley_terry(scores_P2, self.least_margin).sum(),
            self.centring * scores_P2.sum(1).square().sum(),
            (apart_P > 0).to(apart_P.dtype).sum(),
            apart_P.sum(),
            chosen_P.sum(),
            rejected_P.sum(),
        )


def bradley_terry(scores_P2: Tensor, margin: float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) of each pair, [P].

    Source: Ouyang et al., 2022 (InstructGPT), eq. 1; of the margin, Touvron et al., 2023 (Llama 2), eq. 2.
    """
    apart_P = scores_P2[:, 0] - scores_P2[:, 1]
    return -F.logsigmoid(apart_P - margin)
