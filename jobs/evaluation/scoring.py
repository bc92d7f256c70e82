"""How likely a model finds the ends of sequences, several sequences at a time."""

# Shapes: B sequences of a batch, T tokens of the longest, N tokens that are scored.

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from moray.data.chat.turns import ChatTemplate
from moray.data.tokenizer import Tokenizer
from moray.jobs.evaluation.ranks import ALONE, Pass, Ranks
from moray.model import Decoder
from moray.model.decoder import IGNORED


@dataclass(frozen=True)
class Model:
    """A decoder and its tokenizer.

    batch_tokens: the most tokens of a forward pass, with padding; a longer sequence has one of its own. ranks: those
    that share the passes, where the decoder is spread over several. template: how it is spoken with, if it is known.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    batch_tokens: int
    ranks: Ranks = ALONE
    template: ChatTemplate | None = None

    @property
    def longest(self) -> int:
        """The most tokens of which it predicts the next one."""
        return self.decoder.config.max_seq_len


class Scored(NamedTuple):
    """Tokens of which the last `n_scored` are predicted, each from all before it."""

    tokens: np.ndarray
    n_scored: int


class Score(NamedTuple):
    """log_likelihood: the sum of the scored tokens' log-probabilities, in nats. is_greedy: each was the likeliest."""

    log_likelihood: float
    is_greedy: bool


@torch.no_grad()
def score(model: Model, sequences: Sequence[Scored]) -> list[Score]:
    """A score for each sequence, of at most `model.longest` + 1 tokens, in their order.

    Padding stands behind a sequence, where no token of it looks: it changes no score.
    Raises FloatingPointError for scores that are no numbers.
    """
    lengths = [len(sequence.tokens) - 1 for sequence in sequences]
    return model.ranks.share(lengths, model.batch_tokens, lambda part: _score_batch(model, sequences, part))


def _score_batch(model: Model, sequences: Sequence[Scored], part: Pass) -> list[Score]:
    batch = [sequences[index] for index in part.indices]
    tokens_BT = torch.zeros(part.rows, part.width, dtype=torch.int64)
    targets_BT = torch.full_like(tokens_BT, IGNORED)
    for row, each in enumerate(batch):
        end, tokens = len(each.tokens) - 1, torch.from_numpy(each.tokens.astype(np.int64))
        tokens_BT[row, :end] = tokens[:-1]
        targets_BT[row, end - each.n_scored : end] = tokens[-each.n_scored :]
    device = model.decoder.embedding.weight.device
    logp_N, greedy_N = model.decoder.score(tokens_BT.to(device), targets_BT.to(device))
    counts = [each.n_scored for each in batch]
    scores = []
    for logp, greedy in zip(logp_N.cpu().split(counts), greedy_N.cpu().split(counts), strict=True):
        total = float(logp.double().sum())
        if not math.isfinite(total):
            raise FloatingPointError(f"log-likelihoods reach {total}: the weights are damaged, or training diverged")
        scores.append(Score(total, bool(greedy.all())))
    return scores
