"""Pairs and models that are small enough to be computed a sequence at a time."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moray.model import Decoder, ModelConfig, initialise
from moray.model.alignment.pairs import PairBatch

VOCAB, WIDTH = 23, 64


@dataclass(frozen=True)
class Answered:
    """What was asked, and an answer to it."""

    asked: list[int]
    answer: list[int]

    @property
    def tokens(self) -> list[int]:
        return [*self.asked, *self.answer]


Pair = tuple[Answered, Answered]


def random_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Answers of 1 to 9 tokens, unlike in length, which differ from their first token on."""
    draw = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        asked = draw.integers(1, VOCAB, int(draw.integers(1, 6))).tolist()
        chosen, rejected = (draw.integers(1, VOCAB, int(draw.integers(1, 10))).tolist() for _ in range(2))
        pairs.append((Answered(asked, chosen), Answered(asked, [chosen[0] % (VOCAB - 1) + 1, *rejected[1:]])))
    return pairs


def lane(pairs: list[Pair]) -> Tensor:
    """Tokens, targets, positions and documents of a lane that holds them, int64 [4, 2, T]."""
    rows = torch.tensor([[0], [-100], [0], [-1]]).repeat(2, 1, WIDTH).view(2, 4, WIDTH).transpose(0, 1).contiguous()
    for side in range(2):
        at = 0
        for number, pair in enumerate(pairs):
            tokens = torch.tensor(pair[side].tokens)
            here, first = slice(at, at + len(tokens)), len(pair[side].asked)
            rows[0, side, here] = tokens
            rows[1, side, at + first - 1 : here.stop - 1] = tokens[first:]
            rows[2, side, here] = torch.arange(len(tokens))
            rows[3, side, here] = number
            at = here.stop
    return rows


def batch_of(*lanes: list[Pair]) -> PairBatch:
    return PairBatch.of_lanes(*torch.stack([lane(pairs) for pairs in lanes], dim=1), torch.device("cpu"))


def decoder_of(seed: int, **changes: object) -> Decoder:
    config = ModelConfig.preset("demo-dense").but(
        n_layers=2,
        d_model=32,
        vocab_size=VOCAB,
        attention={"n_heads": 2, "n_kv_heads": 1, "head_dim": 16},
        ffn={"width": 48},
        init={"std": 0.3},
        **changes,
    )
    decoder = Decoder(config).double()
    initialise(decoder, seed)
    return decoder


def alone(decoder: Decoder, answered: Answered) -> Tensor:
    """Log-probabilities of an answer's tokens, from the logits of its sequence alone."""
    logp_TV = decoder(torch.tensor([answered.tokens]))[0].log_softmax(-1)
    first = len(answered.asked)
    answer = torch.tensor(answered.answer)
    return logp_TV[first - 1 : -1].gather(1, answer[:, None])[:, 0]
