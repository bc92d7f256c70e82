"""A micro-batch of pairs: chosen and rejected answers to the same, each in a row of its own."""

# Shapes: R = 2 rows for each of this micro-batch's lanes, T tokens of a row, P pairs.

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from moray.model.attention.documents import Documents
from moray.model.loss import IGNORED
from moray.model.objective import MicroBatch


@dataclass(frozen=True, kw_only=True)
class PairBatch(MicroBatch):
    """Rows come in twos, the chosen one first, whose i-th documents are of the same pair.

    sides_RT (int64): 2 p of the chosen tokens of pair p, 2 p + 1 of the rejected ones; 2 P is padding.
    last_P2 (int64): where in the flattened rows the last token of each side is.
    """

    sides_RT: Tensor
    last_P2: Tensor
    n_pairs: int

    @classmethod
    def of_lanes(
        cls,
        tokens_B2T: Tensor,
        targets_B2T: Tensor,
        positions_B2T: Tensor,
        documents_B2T: Tensor,
        device: torch.device,
        flops: float = 0.0,
    ) -> Self:
        """From tensors on the CPU."""
        rows = [x.flatten(0, 1) for x in (tokens_B2T, targets_B2T, positions_B2T, documents_B2T)]
        tokens_RT, targets_RT, positions_RT, documents_RT = rows
        per_lane_B = documents_B2T.amax((1, 2)) + 1
        n_pairs, before_B = int(per_lane_B.sum()), per_lane_B.cumsum(0) - per_lane_B
        pair_B2T = before_B[:, None, None] + documents_B2T
        side_21 = torch.arange(2)[:, None]
        sides_B2T = torch.where(documents_B2T >= 0, 2 * pair_B2T + side_21, 2 * n_pairs)
        place = torch.arange(sides_B2T.numel())
        last_S = torch.zeros(2 * n_pairs + 1, dtype=torch.int64).scatter_reduce_(0, sides_B2T.flatten(), place, "amax")
        return cls(
            tokens_RT.to(device, non_blocking=True),
            targets_RT.to(device, non_blocking=True),
            positions_RT.to(device, non_blocking=True),
            Documents.of(documents_RT, device),
            int((targets_RT != IGNORED).sum()),
            flops=flops,
            sides_RT=sides_B2T.flatten(0, 1).to(device, non_blocking=True),
            last_P2=last_S[:-1].view(n_pairs, 2).to(device, non_blocking=True),
            n_pairs=n_pairs,
        )

    def per_side(self, x_RT: Tensor) -> Tensor:
        """The sum over the tokens of each side of each pair, [P, 2] (fp64)."""
        totals_S = torch.zeros(2 * self.n_pairs + 1, dtype=torch.float64, device=x_RT.device)
        return totals_S.index_add(0, self.sides_RT.flatten(), x_RT.flatten().double())[:-1].view(-1, 2)
