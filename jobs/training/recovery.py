"""A run's snapshots in memory: made room for before the first step, taken between steps, gone on from after a fault."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from moray import UserError
from moray.cluster.host_memory import free_memory
from moray.cluster.worker import WorkerContext, WrongResultError
from moray.jobs.config.run import RunConfig
from moray.parallel.checkpoint.snapshots import Snapshots


def make_room(
    context: WorkerContext, config: RunConfig, state: dict[str, Tensor], on_event: Callable[[str, dict[str, Any]], None]
) -> Snapshots | None:
    """Snapshots of `state`; None where none are wanted or nothing outlives the workers. Collective.

    Raises UserError where this node's memory cannot hold them.
    """
    every = config.recovery.snapshot_every
    if context.memory is None and every not in ("auto", 0) and context.rank == 0:
        on_event("no_snapshots", {"every": every, "launcher": config.cluster.launcher})
    if every == 0 or context.memory is None:
        return None
    snapshots = Snapshots(
        context.memory.files,
        context.memory.ranks,
        context.memory.node,
        state,
        generation=context.generation,
        every=None if every == "auto" else every,
        on_event=on_event,
    )
    missing = snapshots.bytes_here - snapshots.bytes_reserved
    # The others of this node may be at it already: only one looks, before all begin.
    snapshots.reserve(lambda: _check(missing, snapshots.bytes_here, every) if context.local_rank == 0 else None)
    return snapshots


@contextmanager
def forgotten_if_wrong(snapshots: Snapshots | None) -> Iterator[None]:
    """Where numbers turn out to be wrong, what lies in memory may be so, too: only a commit is to be gone on from."""
    try:
        yield
    except (FloatingPointError, WrongResultError):
        if snapshots:
            snapshots.clear()
        raise


def _check(missing: int, needed: int, every: int | str) -> None:
    if missing > (free := free_memory()):
        raise UserError(
            f"recovery.snapshot_every={every} needs {needed / 2**20:,.0f} MiB of memory on {socket.gethostname()}, for "
            f"two copies of the state of its workers and of those it stands in for, but {free / 2**20:,.0f} MiB are "
            "free; use more nodes, or recovery.snapshot_every=0 to recover from commits alone"
        )
