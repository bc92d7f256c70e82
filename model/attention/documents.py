"""Which tokens of a packed batch belong together."""

# Shapes: B batch, T tokens.

from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Which tokens of a packed batch belong together, found once on the CPU: no device has to be waited for.

    lengths: tokens of each document piece in row-major order, or None when every row is one document: attention then
    runs on the batch whole. valid_BT (bool, on the model's device): False for padding. edges (int32, on a GPU alone):
    where each piece begins in the flattened batch, and where the last one ends.
    """

    lengths: list[int] | None
    valid_BT: Tensor
    edges: Tensor | None = None

    @classmethod
    def of(cls, ids_BT: Tensor, device: torch.device) -> Self:
        """From each token's document id, [B, T]; -1 is padding."""
        lengths = document_lengths(ids_BT)
        valid_BT = (ids_BT >= 0).to(device, non_blocking=True)
        if device.type != "cuda":
            return cls(lengths, valid_BT)
        rows, width = ids_BT.shape
        edges = torch.tensor([0, *accumulate(lengths or [width] * rows)], dtype=torch.int32)
        return cls(lengths, valid_BT, edges.to(device, non_blocking=True))


def document_lengths(documents_BT: Tensor) -> list[int] | None:
    """Lengths of the runs of equal document ids, row after row; None when every row is a single run."""
    rows, width = documents_BT.shape
    starts = torch.ones(rows, width, dtype=torch.bool)
    starts[:, 1:] = documents_BT[:, 1:].cpu() != documents_BT[:, :-1].cpu()
    edges = starts.flatten().nonzero().flatten()
    if len(edges) == rows:
        return None
    return torch.diff(edges, append=torch.tensor([rows * width])).tolist()
