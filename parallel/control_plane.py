"""How ranks agree on small things (a list of folders, a list of problems) through host memory."""

import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")
WAIT_S = 1.0


def meet(on_wait: Callable[[], None], group: dist.ProcessGroup | None = None) -> None:
    """Returns on all ranks of the group (by default all) together; while others are awaited, `on_wait` is called once a
    second.
    """
    if not dist.is_initialized():
        return
    meeting, are_here = dist.barrier(group, async_op=True), threading.Event()
    meeting.get_future().add_done_callback(lambda _: are_here.set())
    while not are_here.wait(WAIT_S):
        on_wait()
    meeting.wait()


class RanksError(RuntimeError):
    """What went wrong, by the rank on which it did."""

    def __init__(self, failures: dict[int, Exception]) -> None:
        super().__init__("; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, e in sorted(failures.items())))
        self.failures = failures


class ControlPlane:
    """A gloo group of its own over all ranks, so that a background thread never meets the training's collectives.

    Creating one is collective. Without torch.distributed it is a group of one.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.rank = dist.get_rank() if self.group else 0
        self.world_size = dist.get_world_size() if self.group else 1

    def from_rank_0(self, function: Callable[[], T]) -> T:
        """function() as rank 0 computes it; what it raises there is raised on all, so that none is left waiting."""
        outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.rank == 0:
            try:
                outcome = [(function(), None)]
            except Exception as raised:
                outcome = [(None, raised)]
        if self.group:
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        value, error = outcome[0]
        if error:
            raise error
        return value  # type: ignore[return-value]

    def each(self, function: Callable[[], T]) -> list[T]:
        """What function() gives on every rank, in rank order; on rank 0, and nothing on the others.

        Raises RanksError on all ranks where it has raised on any.
        """
        outcome: tuple[T | None, Exception | None] = (None, None)
        try:
            outcome = (function(), None)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # which hold what the function worked on
            outcome = (None, error)
        outcomes = [outcome]
        if self.group:
            outcomes = [outcome] * self.world_size if self.rank == 0 else []
            dist.gather_object(outcome, outcomes or None, dst=0, group=self.group)
        failures = self.from_rank_0(lambda: {rank: error for rank, (_, error) in enumerate(outcomes) if error})
        if failures:
            raise RanksError(failures)
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order, on all ranks."""
        if not self.group:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values
