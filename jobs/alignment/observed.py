"""What models say of a step's answers before the first update: how likely each token is, and what a critic expects.

Nothing of it has a gradient. What the policy says is what the updates' ratios are to, and it is compared with what the
tokens were drawn by.
"""

# Shapes: R rows of T tokens, of which a piece has B; S samples, L layers with experts, K experts per token.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moray.jobs.alignment.answers import Written
from moray.jobs.alignment.packed import Rows, packed
from moray.jobs.training.begin import Training
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


@dataclass(frozen=True)
class Observed:
    """A micro-batch of a minibatch, and of its answers' tokens (each at its target's place, 0 elsewhere): their
    log-probabilities under the policy and its reference, and the critic's values of what stands before each.
    """

    piece: range
    batch: MicroBatch
    logp_BT: Tensor
    reference_logp_BT: Tensor | None
    values_BT: Tensor | None
    routes: Routes | None
    mismatch: Mismatch


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
    parts = (rows.tokens_RT[here], rows.targets_RT[here], rows.positions_RT[here], rows.documents_RT[here])
    return MicroBatch.of(*parts, training.context.device)


@torch.no_grad()
def observe(training: Training, of: Minibatch, everyone: Sequence[Written]) -> list[Observed]:
    """Each of the minibatch's pieces. Collective."""
    rl, decoder, critic = training.config.rl, training.decoder, training.critic
    chosen = [everyone[sample] for sample in of.samples]
    drawn_RT = of.rows.placed([written.answer.logp for written in chosen])
    routes_RTLK = _routes(of.rows, chosen)
    reference = training.frozen.get("reference")
    found = []
    for piece in of.pieces:
        batch, part = plain(training, of.rows, piece), slice(piece.start, piece.stop)
        inputs = (batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents)
        routes, is_answer_BT = None, batch.targets_BT != IGNORED
        if routes_RTLK is not None:
            recorded_BTLK = routes_RTLK[part].to(batch.tokens_BT.device)
            routes = Routes.of(recorded_BTLK, decoder.config, is_replayed=rl.replay_routing)
        logp_BT = decoder.logprobs(*inputs, rl.temperature, routes)
        difference_BT = logp_BT - drawn_RT[part].to(batch.tokens_BT.device)
        mismatch = _mismatch(difference_BT, is_answer_BT, routes)
        reference_logp_BT = reference.decoder.logprobs(*inputs, rl.temperature) if reference else None
        values_BT = None
        if critic:
            values_BT = critic.decoder.values(batch.tokens_BT, batch.positions_BT, batch.documents) * is_answer_BT
        found.append(Observed(piece, batch, logp_BT, reference_logp_BT, values_BT, routes, mismatch))
        training.pulse.again()
    for learner in (decoder, *([critic.decoder] if critic else [])):
        forget_counts(learner)  # these passes are no step's
    return found


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
