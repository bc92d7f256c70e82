"""Samples of a step in rows, the same on every rank: each rank learns from its share of them.

Which samples share a row is a function of their lengths alone (`data/packing.py`), and so of no layout.
"""

# Shapes: S samples, R rows of T tokens.

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moray.data.packing import pack
from moray.model.loss import IGNORED


@dataclass(frozen=True)
class Rows:
    """int64 [R, T] each, on the CPU. A token of an answer is the target of the one before it, at whose place all that
    is known of it stands. documents_RT: number in the row, -1 is padding.

    places: of each sample, its row and from where to where there its answer's targets are. ends_S: where in R * T its
    last token is.
    """

    tokens_RT: Tensor
    targets_RT: Tensor
    positions_RT: Tensor
    documents_RT: Tensor
    places: list[tuple[int, slice]]
    ends_S: list[int]

    def placed(self, values: Sequence[np.ndarray]) -> Tensor:
        """What is known of each sample's answer, a number a token, in its place, [R, T] (fp64); 0 elsewhere."""
        rows_RT = torch.zeros(self.tokens_RT.shape, dtype=torch.float64)
        for (row, here), of_sample in zip(self.places, values, strict=True):
            rows_RT[row, here] = torch.as_tensor(of_sample, dtype=torch.float64)
        return rows_RT

    def samples_in(self, rows: range) -> list[int]:
        return [sample for sample, (row, _) in enumerate(self.places) if row in rows]


def packed(samples: Sequence[tuple[np.ndarray, np.ndarray]], seq_len: int, multiple: int) -> Rows:
    """Of prompts and answers, of at most seq_len tokens together. Rows without a sample fill up to a multiple."""
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in samples])
    packing = pack(lengths, seq_len)
    n_rows = -(-len(packing.ends) // multiple) * multiple
    rows_4RT = torch.tensor([0, IGNORED, 0, -1])[:, None, None].repeat(1, n_rows, seq_len)
    places: dict[int, tuple[int, slice]] = {}
    ends: dict[int, int] = {}
    for row in range(len(packing.ends)):
        at = 0
        for number, sample in enumerate(packing.row(row).tolist()):
            prompt, answer = (torch.from_numpy(part.astype(np.int64)) for part in samples[sample])
            whole = torch.cat((prompt, answer))
            here = slice(at, at := at + len(whole))
            places[sample] = row, slice(here.start + len(prompt) - 1, here.stop - 1)
            ends[sample] = row * seq_len + here.stop - 1
            rows_4RT[0, row, here] = whole
            rows_4RT[1, row, places[sample][1]] = answer
            rows_4RT[2, row, here] = torch.arange(len(whole))
            rows_4RT[3, row, here] = number
    each = range(len(samples))
    tokens_RT, targets_RT, positions_RT, documents_RT = rows_4RT
    in_order = [places[sample] for sample in each], [ends[sample] for sample in each]
    return Rows(tokens_RT, targets_RT, positions_RT, documents_RT, *in_order)
