"""Hardware that computes wrongly: the same numbers computed twice must be the same.

A step with a bad value is computed once more by the same ranks, and every train.audit_every steps one micro-batch of
each rank by the next group of data-parallel ranks whose results depend on each other, in the same place there.
"""

# Shapes: W ranks, and for each the X numbers that GlobalLosses.own_MX has of one of its micro-batches.

import math
import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moray.cluster.worker import WrongResultError
from moray.data.stream import Batch
from moray.jobs.training.batches import micro_batches, stream_of
from moray.jobs.training.begin import Training, lanes_of
from moray.model.objective import MicroBatch
from moray.parallel.gradients import GlobalLosses, accumulate_gradients, drop_gradients

TOLERANCE = 1e-3
"""Relative, on GPUs without audit_every, which asks for deterministic kernels: others add in any order."""
Computed = tuple[GlobalLosses, float]
"""A step's losses, and its gradient's norm."""


def check_alike(training: Training, why: str, first: Computed, second: Computed) -> None:
    """Raises WrongResultError, on all ranks, where a step that is bad was something else when computed again."""
    (one, norm), (other, other_norm) = first, second
    if _agree(training, [*one.values.values(), norm], [*other.values.values(), other_norm]):
        return
    found = zip(*(_everyone(losses.own_MX.flatten()).tolist() for losses in (one, other)), strict=True)
    suspects = [rank for rank, (mine, again) in enumerate(found) if not _agree(training, mine, again)]
    _accuse(training, suspects, f"{why}; computed again, loss {other.loss}, gradient norm {other_norm}")


def recomputed(training: Training, batch: Batch, pieces: Sequence[MicroBatch], groups: int) -> Tensor:
    """The audited micro-batch of every rank as the rank that lies so many groups before it computes it. Shape: [W, X].

    To be called before the step itself, which stays bit for bit what it is without: gradients and counts are dropped.
    """
    train, layout = training.config.train, training.layout
    neighbour = (layout.dp_rank(training.context.rank) + groups * layout.span) % layout.dp
    first = _audited(training, pieces) * train.micro_batch
    lanes = lanes_of(train, layout, neighbour)[first : first + train.micro_batch]
    theirs = stream_of(training.sources, training.config, lanes, cache_bytes=0).batch(batch.step)
    audited = micro_batches(training, theirs, lanes)
    losses = accumulate_gradients(
        training.decoder, audited, training.reduction, training.witness, of=pieces, objective=training.objective
    )
    drop_gradients(training.decoder)
    return _everyone(losses.own_MX[0]).roll(groups * layout.span * layout.tp, 0)


def compare(training: Training, batch: Batch, pieces: Sequence[MicroBatch], own_MX: Tensor, second_WX: Tensor) -> None:
    """What ranks themselves computed in a step with what others did; a third computation decides who is wrong.

    Raises WrongResultError on all ranks.
    """
    own, second = _everyone(own_MX[_audited(training, pieces)]).tolist(), second_WX.tolist()
    wrong = [rank for rank in range(len(own)) if not _agree(training, own[rank], second[rank])]
    if not wrong:
        return
    third = recomputed(training, batch, pieces, groups=2).tolist()
    distance, suspects = training.layout.span * training.layout.tp, set[int]()
    for rank in wrong:
        votes = [_agree(training, third[rank], answer[rank]) for answer in (own, second)]
        suspects.update(outvoted([(rank - groups * distance) % len(own) for groups in range(3)], *votes))
    _accuse(training, sorted(suspects), f"an audit of ranks {wrong} found other numbers than they had")


def outvoted(ranks: Sequence[int], is_third_first: bool, is_third_second: bool) -> Sequence[int]:
    """Whose of three answers is not that of the two others; all whom it may be, where that decides nothing.

    With two groups the third answer is the first one's own again: if it is the same, either of the two may be wrong.
    """
    if ranks[0] == ranks[2]:
        return ranks[:2] if is_third_first else ranks[:1]
    return ranks[1:2] if is_third_first else ranks[:1] if is_third_second else ranks


def _audited(training: Training, pieces: Sequence[MicroBatch]) -> int:
    if training.config.train.zero_stage == 1:
        return 0  # what is seen of the others' gradients is the sum so far
    return (training.step + 1) // training.config.train.audit_every % len(pieces)


def _accuse(training: Training, suspects: Sequence[int], what: str) -> None:
    nodes = [socket.gethostname()] * training.context.world_size
    if dist.is_initialized():
        dist.all_gather_object(nodes, nodes[0])
    step = training.step + 1
    training.note("wrong_result", step=step, ranks=[{"rank": r, "node": nodes[r]} for r in suspects], what=what)
    who = " or ".join(f"rank {rank} on {nodes[rank]}" for rank in suspects) or "a rank that left no other trace"
    raise WrongResultError(f"step {step}: {who} computed wrongly: {what}", tuple(suspects))


def _agree(training: Training, ones: Sequence[float], others: Sequence[float]) -> bool:
    """Whether numbers are the same. Which of inf and nan comes of an overflow may be chance."""
    is_exact = training.witness or training.context.device.type == "cpu"
    return all(
        math.isfinite(one) == math.isfinite(other)
        and (not math.isfinite(one) or math.isclose(one, other, rel_tol=0.0 if is_exact else TOLERANCE))
        for one, other in zip(ones, others, strict=True)
    )


def _everyone(own: Tensor) -> Tensor:
    """Of all ranks, in their order. Shape: [W, ...]."""
    if not dist.is_initialized():
        return own[None]
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own.contiguous())
    return torch.stack(found)
