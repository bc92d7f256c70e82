"""Exchanges among the ranks of a group that begin at once and are waited for later, and a count of what they bring."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

Pending = Callable[[], Tensor]
"""What an exchange brings: to call it is to wait for it."""


@dataclass
class Traffic:
    """What came to this rank from others since it was last forgotten: tokens on their way to experts (each counts once,
    however often it is computed again), and bytes of all that travels, gradients and sizes too.
    """

    rows: int = 0
    bytes: int = 0

    def forget(self) -> None:
        self.rows = self.bytes = 0


class Wire:
    """A group's, whose traffic is counted. On CUDA exchanges have a stream of their own, under gloo a thread."""

    def __init__(self, group: dist.ProcessGroup, traffic: Traffic) -> None:
        self.group, self.ranks, self.rank, self.traffic = group, group.size(), group.rank(), traffic

    def all_to_all(self, x: Tensor, received_P: list[int], sent_P: list[int]) -> Pending:
        """Sends runs of so many rows to each rank, in order; brings what the ranks have sent, in theirs."""
        found = x.new_empty(sum(received_P), *x.shape[1:])
        self._count(found, sum(received_P) - received_P[self.rank])
        return _landing(
            found, dist.all_to_all_single(found, x.contiguous(), received_P, sent_P, group=self.group, async_op=True)
        )

    def all_gather(self, x: Tensor) -> Pending:
        """Sends all to every rank; brings what each has sent, in the order of the ranks."""
        found = x.new_empty(self.ranks * len(x), *x.shape[1:])
        self._count(found, (self.ranks - 1) * len(x))
        return _landing(found, dist.all_gather_single(found, x.contiguous(), group=self.group, async_op=True))

    def _count(self, found: Tensor, rows: int) -> None:
        self.traffic.bytes += rows * found[:1].numel() * found.itemsize


def _landing(found: Tensor, work: dist.Work) -> Pending:
    under_way = [work]  # which holds what is sent until it has arrived

    def land() -> Tensor:
        while under_way:
            under_way.pop().wait()
        return found

    return land
