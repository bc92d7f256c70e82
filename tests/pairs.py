"""Pairs of answers, packed into rows: what objectives of preferences are tried with."""

import torch
from torch import Tensor

from moray.model.alignment.reward_model import ScoredPairs, pair_ends
from moray.model.objective import MicroBatch

TOKENS, VOCABULARY = 16, 64
LENGTHS = [[(3, 5)], [(4, 2), (1, 6), (7, 1)], [(2, 9), (12, 3)], [(16, 16)]]
"""Of each lane, tokens of its pairs' chosen and rejected answers."""


def answers(seed: int = 0) -> list[list[tuple[Tensor, Tensor]]]:
    """Of each lane, the tokens of its pairs."""
    draw = torch.Generator().manual_seed(seed)
    return [[tuple(torch.randint(VOCABULARY, (n,), generator=draw) for n in both) for both in lane] for lane in LENGTHS]


def packed(lanes: list[list[tuple[Tensor, Tensor]]], margins_P: Tensor | None = None, padding: int = 0) -> ScoredPairs:
    """Two rows a lane."""
    tokens = torch.full((2 * len(lanes), TOKENS), padding)
    positions, documents = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    for lane, pairs in enumerate(lanes):
        for side in (0, 1):
            start, row = 0, 2 * lane + side
            for number, pair in enumerate(pairs):
                end = start + len(pair[side])
                tokens[row, start:end] = pair[side]
                positions[row, start:end] = torch.arange(end - start)
                documents[row, start:end] = number
                start = end
    batch = MicroBatch.of(tokens, torch.full_like(tokens, -100), positions, documents, torch.device("cpu"))
    return ScoredPairs(**vars(batch), ends_P2=pair_ends(documents), margins_P=margins_P)
