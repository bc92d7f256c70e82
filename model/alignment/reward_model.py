"""A reward model: a decoder with a scalar head learns which of two answers people prefer."""

# Shapes: B rows of T tokens, P pairs; of each pair, the chosen answer is first and the rejected one second.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moray.model.decoder import Decoder
from moray.model.objective import MicroBatch, Objective


@dataclass(frozen=True, kw_only=True)
class ScoredPairs(MicroBatch):
    """Rows of pairs, packed: document i of row 2k is the chosen answer of a pair, that of row 2k + 1 the rejected one.

    ends_P2: `pair_ends` of the rows. margins_P: how far apart the answers are for those who chose, or None. Both on the
    model's device.
    """

    ends_P2: Tensor
    margins_P: Tensor | None = None

    @property
    def n_pairs(self) -> int:
        return len(self.ends_P2)


@dataclass(frozen=True)
class RewardModel(Objective[ScoredPairs]):
    """`bradley_terry` a pair, and `centring` times the squared sum of a pair's scores, which keeps them around 0.

    Ties count as mistakes in the accuracy; margin is the chosen answer's score minus the other's.
    Source: of the centring, Eisenstein et al., 2023 (`center_rewards_coefficient` in TRL).
    """

    centring: float = 0.0
    names = ("loss", "centring", "accuracy", "margin", "chosen_score", "rejected_score")

    def counts(self, piece: ScoredPairs) -> tuple[float, ...]:
        return (piece.n_pairs,) * len(self.names)

    def sums(self, decoder: Decoder, piece: ScoredPairs) -> tuple[Tensor, ...]:
        scores_BT = decoder.values(piece.tokens_BT, piece.positions_BT, piece.documents)
        scores_P2 = scores_BT.flatten()[piece.ends_P2]
        chosen_P, rejected_P = scores_P2.detach().unbind(1)
        apart_P = chosen_P - rejected_P
        return (
            bradley_terry(scores_P2, piece.margins_P).sum(),
            self.centring * scores_P2.sum(1).square().sum(),
            (apart_P > 0).to(apart_P.dtype).sum(),
            apart_P.sum(),
            chosen_P.sum(),
            rejected_P.sum(),
        )


def bradley_terry(scores_P2: Tensor, margins_P: Tensor | None = None) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) of each pair, [P].

    Source: Ouyang et al., 2022 (InstructGPT), eq. 1; of the margin, Touvron et al., 2023 (Llama 2), eq. 2.
    """
    apart_P = scores_P2[:, 0] - scores_P2[:, 1]
    return -F.logsigmoid(apart_P if margins_P is None else apart_P - margins_P)


def pair_ends(documents_BT: Tensor) -> Tensor:
    """Where in B * T the last token of each answer lies, [P, 2], from each token's document id (-1: padding)."""
    is_end_BT = documents_BT >= 0
    is_end_BT[:, :-1] &= documents_BT[:, 1:] != documents_BT[:, :-1]
    index_BT = torch.arange(documents_BT.numel(), device=documents_BT.device).view_as(documents_BT)
    ends, ids = ([x_BT[side::2][is_end_BT[side::2]] for side in (0, 1)] for x_BT in (index_BT, documents_BT))
    assert torch.equal(*ids), f"rows 2k and 2k + 1 are of the same pairs, which {ids} are not"
    return torch.stack(ends, 1)
