"""Hardware that computes wrongly: the same numbers computed twice must be the same.

A step with a bad value is computed once more by the same ranks, and every train.audit_every steps one micro-batch by
other ones: the next group of data-parallel ranks whose results depend on each other, in the same places.
"""

# Shapes: M micro-batches of this rank, W ranks, 4 numbers a micro-batch as GlobalLosses.own_M4 has them.

import math
import socket
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moray.cluster.worker import WrongResultError
from moray.data.stream import Batch
from moray.jobs.training.batches import micro_batches, stream_of
from moray.jobs.training.begin import Training
from moray.parallel.gradients import Counts, GlobalLosses, accumulate_gradients, drop_gradients

TOLERANCE = 1e-3
"""Relative, on GPUs without audit_every, which asks for deterministic kernels: others add in any order."""


class Computed(NamedTuple):
    """What a step came to before the weights were touched."""

    losses: GlobalLosses
    norm: float

    @property
    def values(self) -> tuple[float, ...]:
        return self.losses.cross_entropy, self.losses.z, self.losses.auxiliary, self.norm


def check_alike(training: Training, why: str, first: Computed, second: Computed) -> None:
    """Raises WrongResultError, on all ranks, where a step computed twice by the same ranks came to two results."""
    if agree(first.values, second.values, _tolerance(training)):
        return
    answers = zip(_everyone(first.losses.own_M4), _everyone(second.losses.own_M4), strict=True)
    suspects = [rank for rank, (one, other) in enumerate(answers) if not _same(training, one, other)]
    values = f"loss {second.losses.cross_entropy}, gradient norm {second.norm}"
    accuse(training, suspects, f"{why}; computed once more {values}")


class Audit:
    """Of one micro-batch of each rank in one step; computed before the step itself. Collective.

    The gradients that it makes are dropped, so that the step is bit for bit what it is without.
    """

    def __init__(self, training: Training, batch: Batch, counts: Counts, n_pieces: int) -> None:
        self._training, self._batch, self._counts = training, batch, counts
        self._piece = (training.step + 1) // training.config.train.audit_every % n_pieces
        self._theirs_4 = self._recompute(groups=1)

    def compare(self, losses: GlobalLosses) -> None:
        """With what the ranks themselves computed in the step. A third computation decides who is wrong.

        Raises WrongResultError on all ranks.
        """
        own_4 = losses.own_M4[self._piece]
        own_W4, second_W4 = _everyone(own_4), self._of_rank(self._theirs_4, groups=1)
        wrong = [rank for rank in range(len(own_W4)) if not _same(self._training, own_W4[rank], second_W4[rank])]
        if not wrong:
            return
        third_W4 = self._of_rank(self._recompute(groups=2), groups=2)
        suspects: set[int] = set()
        for rank in wrong:
            holders = [self._rank(rank, -groups) for groups in range(3)]
            answers = own_W4[rank], second_W4[rank], third_W4[rank]
            suspects.update(outvoted(holders, [tuple(answer.tolist()) for answer in answers]))
        accuse(self._training, sorted(suspects), f"an audit of ranks {wrong} found other numbers than they had")

    def _recompute(self, groups: int) -> Tensor:
        """What this rank makes of the audited micro-batch of the rank that lies so many groups after it."""
        training, train = self._training, self._training.config.train
        share = len(training.lanes)
        dp_rank = training.layout.dp_rank(self._rank(training.context.rank, groups))
        first = dp_rank * share + self._piece * train.micro_batch
        lanes = range(first, min(first + train.micro_batch, (dp_rank + 1) * share))
        batch = stream_of(training.dataset, train, lanes, cache_bytes=0).batch(self._batch.step)
        pieces = micro_batches(training, batch, lanes)
        losses = accumulate_gradients(training.decoder, pieces, training.layout.tp, training.witness, self._counts)
        drop_gradients(training.decoder)
        return losses.own_M4[0]

    def _of_rank(self, answer_4: Tensor, groups: int) -> Tensor:
        """Everyone's answers, in the order of the ranks whose micro-batch they are about. Shape: [W, 4]."""
        answers_W4 = _everyone(answer_4)
        return answers_W4[[self._rank(rank, -groups) for rank in range(len(answers_W4))]]

    def _rank(self, rank: int, groups: int) -> int:
        layout = self._training.layout
        return (rank + groups * layout.span * layout.tp) % layout.world_size


def outvoted(ranks: Sequence[int], answers: Sequence[tuple[float, ...]]) -> Iterator[int]:
    """Whose of three answers is not that of the two others; all whom it may be, where that decides nothing.

    With two groups the third answer is the first one's own again: if it is the same, either of the two may be wrong.
    """
    own, second, third = answers
    if ranks[0] == ranks[2]:
        yield from ranks[:1] if third != own else ranks[:2]
    elif third == own:
        yield ranks[1]
    elif third == second:
        yield ranks[0]
    else:
        yield from ranks


def accuse(training: Training, suspects: Sequence[int], what: str) -> None:
    """Event `wrong_result`, and WrongResultError on all ranks."""
    nodes = [socket.gethostname()] * training.context.world_size
    if dist.is_initialized():
        dist.all_gather_object(nodes, nodes[0])
    step = training.step + 1
    training.note(
        "wrong_result", step=step, ranks=[{"rank": rank, "node": nodes[rank]} for rank in suspects], what=what
    )
    who = " or ".join(f"rank {rank} on {nodes[rank]}" for rank in suspects) or "a rank that left no other trace"
    raise WrongResultError(f"step {step}: {who} computed wrongly: {what}", tuple(suspects))


def agree(ones: Sequence[float], others: Sequence[float], tolerance: float) -> bool:
    """Whether numbers are the same. Which of inf and nan comes of an overflow may be chance."""
    return all(
        math.isclose(one, other, rel_tol=tolerance)
        if math.isfinite(one) and math.isfinite(other)
        else math.isfinite(one) == math.isfinite(other)
        for one, other in zip(ones, others, strict=True)
    )


def _same(training: Training, one: Tensor, other: Tensor) -> bool:
    return agree(one.flatten().tolist(), other.flatten().tolist(), _tolerance(training))


def _tolerance(training: Training) -> float:
    is_exact = training.witness or training.context.device.type == "cpu"
    return 0.0 if is_exact else TOLERANCE


def _everyone(own: Tensor) -> Tensor:
    """Of all ranks, in their order. Shape: [W, ...]."""
    if not dist.is_initialized():
        return own[None]
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own.contiguous())
    return torch.stack(found)
