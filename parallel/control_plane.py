"""How ranks agree on small things (a list of folders, a list of problems) through host memory."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


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

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order, on all ranks."""
        if not self.group:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values
