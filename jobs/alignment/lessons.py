"""What is learnt from some answers: this rank's rows of them, with all that is known of their tokens.

Before the first update, a forward pass of the training says how likely each token is: that is what the updates' ratios
are to, and it is compared with what the token was drawn by.
"""

# Shapes: R rows of T tokens, S samples, L layers with experts, K experts per token.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moray.jobs.alignment.answers import Written
from moray.jobs.alignment.packed import Rows, packed
from moray.jobs.training.begin import Training
from moray.model.alignment.policy import Aggregation, PolicyBatch, aggregation
from moray.model.context import Routes
from moray.model.loss import IGNORED
from moray.model.objective import MicroBatch
from moray.parallel.gradients import forget_counts


@dataclass(frozen=True)
class Minibatch:
    """Samples that an update learns from, in rows. samples: which of the step's; pieces: the rows of each of this
    rank's micro-batches.
    """

    samples: range
    rows: Rows
    pieces: list[range]


class Mismatch(NamedTuple):
    """Of answers' tokens, drawn and computed by the training: the sum of |d log p|, of how many, and the highest; and
    how often a token's experts in a layer were others, of how often they were recorded.
    """

    total: float
    n_tokens: int
    highest: float
    flips: int
    n_routes: int


def minibatch(training: Training, everyone: Sequence[Written], samples: range) -> Minibatch:
    """The rows are the same on every rank, and as many for each of them."""
    dp, rank = training.layout.dp, training.layout.dp_rank(training.context.rank)
    texts = [(everyone[sample].prompt, everyone[sample].answer.tokens) for sample in samples]
    rows = packed(texts, training.config.train.seq_len, dp)
    share, size = len(rows.tokens_RT) // dp, training.config.train.micro_batch
    own = range(rank * share, (rank + 1) * share)
    return Minibatch(samples, rows, [own[start : start + size] for start in range(0, share, size)])


def plain(training: Training, rows: Rows, piece: range) -> MicroBatch:
    """Those rows, on this rank's device."""
    here = slice(piece.start, piece.stop)
    documents_BT = rows.documents_RT[here]
    # A forward pass before the update, and one of each model that stays as it is, are a third of it each.
    asked = 1 + (1 + len(training.frozen)) / 3
    return MicroBatch.of(
        rows.tokens_RT[here],
        rows.targets_RT[here],
        rows.positions_RT[here],
        documents_BT,
        training.context.device,
        None,
        asked * training.work.flops(documents_BT),
    )


@torch.no_grad()
def lesson(
    training: Training, of: Minibatch, everyone: Sequence[Written], advantages_S: Tensor, is_valid_S: Tensor
) -> tuple[list[PolicyBatch], list[Mismatch]]:
    """A micro-batch a piece of the minibatch's rows. advantages_S (fp64), is_valid_S (bool): of all the step's samples.

    Collective.
    """
    rl, rows, decoder = training.config.rl, of.rows, training.decoder
    kind: Aggregation = "dapo" if rl.variant == "cispo" else rl.variant
    chosen = [everyone[sample] for sample in of.samples]
    here = slice(of.samples.start, of.samples.stop)
    advantages_S, is_valid_S = advantages_S[here], is_valid_S[here]
    lengths_S = torch.tensor([len(written.answer.tokens) for written in chosen])
    weight_S, _ = aggregation(kind, lengths_S, is_valid_S, rl.max_new_tokens)
    advantages_RT, weights_RT = (
        rows.placed([np.full(n, x) for n, x in zip(lengths_S.tolist(), x_S.tolist(), strict=True)])
        for x_S in (advantages_S, weight_S)
    )
    drawn_RT = rows.placed([written.answer.logp for written in chosen])
    routes_RTLK = _routes(rows, chosen)
    pieces, found = [], []
    for piece in of.pieces:
        batch, part = plain(training, rows, piece), slice(piece.start, piece.stop)
        device, inputs = (
            batch.tokens_BT.device,
            (batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents),
        )
        routes = None
        if routes_RTLK is not None:
            recorded_BTLK = routes_RTLK[part].to(device)
            routes = Routes.of(recorded_BTLK, decoder.config, is_replayed=rl.replay_routing)
        old_BT = decoder.logprobs(*inputs, rl.temperature, routes)
        found.append(_mismatch(old_BT - drawn_RT[part].to(device), batch.targets_BT != IGNORED, routes))
        reference = training.frozen.get("reference")
        samples = rows.samples_in(piece)
        pieces.append(
            PolicyBatch(
                **vars(batch),
                old_logp_BT=old_BT,
                advantages_BT=advantages_RT[part].to(device),
                reference_logp_BT=reference.decoder.logprobs(*inputs, rl.temperature) if reference else None,
                weights_BT=weights_RT[part].to(device),
                n_own_count=aggregation(kind, lengths_S[samples], is_valid_S[samples], rl.max_new_tokens)[1],
                n_samples=len(samples),
                routes=routes if rl.replay_routing else None,
            )
        )
        training.pulse.again()
    forget_counts(decoder)  # these passes are no step's
    return pieces, found


def _routes(rows: Rows, chosen: Sequence[Written]) -> Tensor | None:
    """The experts that each token passed when it was written, [R, T, L, K]; -1 where that is not known. None of a dense
    model.
    """
    first = chosen[0].answer.routes
    if first is None:
        return None
    routes_RTLK = torch.full((*rows.tokens_RT.shape, *first.shape[1:]), -1, dtype=torch.int16)
    for (row, targets), written in zip(rows.places, chosen, strict=True):
        # An answer's last token was read by nobody; the one before it stands where the last target does.
        start = targets.start - len(written.prompt) + 1
        routes_RTLK[row, start : targets.stop] = torch.from_numpy(written.answer.routes)
    return routes_RTLK


def _mismatch(difference_BT: Tensor, is_answer_BT: Tensor, routes: Routes | None) -> Mismatch:
    away = difference_BT[is_answer_BT].abs()
    flips, n_routes = routes.flips() if routes else (torch.zeros(()), torch.zeros(()))
    highest = away.max().item() if len(away) else 0.0
    return Mismatch(away.sum().item(), len(away), highest, int(flips), int(n_routes))
