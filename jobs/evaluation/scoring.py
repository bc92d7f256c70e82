"""How likely a model finds the ends of sequences, several sequences at a time."""

# Shapes: B sequences of a batch, T tokens of the longest, N tokens that are scored, D model width, V vocabulary.

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moray.data.tokenizer import Tokenizer
from moray.model import Decoder

LOGIT_TOKENS = 1024
"""Tokens whose logits exist at a time: with the vocabulary of 150,000, 600 MB."""


@dataclass(frozen=True)
class Model:
    """A decoder and its tokenizer.

    batch_tokens: the most tokens of a forward pass, with padding; a longer sequence has one of its own.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    batch_tokens: int

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


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences of about the same length, the longest first: what memory cannot hold fails at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        rows = max(batch_tokens // lengths[order[start]], 1)
        yield order[start : start + rows]
        start += rows


@torch.inference_mode()
def score(model: Model, sequences: Sequence[Scored]) -> list[Score]:
    """A score for each sequence, of at most `model.longest` + 1 tokens, in their order.

    Padding stands behind a sequence, where no token of it looks: it changes no score.
    Raises FloatingPointError for scores that are no numbers.
    """
    scores: list[Score | None] = [None] * len(sequences)
    for indices in batches([len(sequence.tokens) - 1 for sequence in sequences], model.batch_tokens):
        for index, found in zip(indices, _score_batch(model, [sequences[i] for i in indices]), strict=True):
            scores[index] = found
    return [found for found in scores if found is not None]


def _score_batch(model: Model, batch: list[Scored]) -> Iterator[Score]:
    device = model.decoder.embedding.weight.device
    tokens_BT, documents_BT = padded([each.tokens[:-1] for each in batch], side="right")
    scored_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    for row, each in enumerate(batch):
        scored_BT[row, len(each.tokens) - 1 - each.n_scored : len(each.tokens) - 1] = True
    targets = np.concatenate([each.tokens[-each.n_scored :] for each in batch])
    x_ND = model.decoder.hidden(tokens_BT.to(device), documents_BT=documents_BT)[scored_BT.to(device)]
    target_N = torch.from_numpy(targets.astype(np.int64)).to(device)
    parts = [
        _of_targets(model.decoder, *chunk)
        for chunk in zip(x_ND.split(LOGIT_TOKENS), target_N.split(LOGIT_TOKENS), strict=True)
    ]
    logp_N, greedy_N = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    counts = [each.n_scored for each in batch]
    for logp, greedy in zip(logp_N.split(counts), greedy_N.split(counts), strict=True):
        total = float(logp.double().sum())
        if not math.isfinite(total):
            raise FloatingPointError(f"log-likelihoods reach {total}: the weights are damaged, or training diverged")
        yield Score(total, bool(greedy.all()))


def _of_targets(decoder: Decoder, x_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """The targets' log-probabilities, and whether each is the likeliest token."""
    logits_NV = decoder.logits(x_ND)
    logp_N = logits_NV.gather(-1, target_N[:, None])[:, 0] - logits_NV.logsumexp(-1)
    return logp_N, logits_NV.argmax(-1) == target_N


def padded(rows: Sequence[np.ndarray], side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Tokens and documents (-1: padding) of rows that are padded on a side to the longest's length, [B, T] each."""
    width = max(map(len, rows))
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    documents_BT = torch.full((len(rows), width), -1)
    for number, row in enumerate(rows):
        part = slice(width - len(row), width) if side == "left" else slice(len(row))
        tokens_BT[number, part] = torch.from_numpy(row.astype(np.int64))
        documents_BT[number, part] = 0
    return tokens_BT, documents_BT
