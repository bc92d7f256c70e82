"""One exchange of tokens among the ranks of a group: there, to ranks that hold experts of theirs, and back, as sums.

A hop knows no gradients: going back is the transpose of going there, and `parallel.expert` uses either for both.
"""

# Shapes: R rows that leave this rank, each once for every rank that holds experts of it: S in all; Q rows that arrive;
# A assignments of the R rows to experts, U those of the Q rows to experts here; D model width, P ranks.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moray.model.moe.dispatch import Assigned, counted, summed

Pending = Callable[[], Tensor]
"""What an exchange brings: to call it is to wait for it."""
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass
class Traffic:
    """What came to this rank from others since it was last forgotten: tokens on their way to experts (each counts once,
    however often it is computed again), and bytes of all that travels, gradients and sizes too.
    """

    rows: int = 0
    bytes: int = 0

    def forget(self) -> None:
        self.rows = self.bytes = 0


class Hop(Protocol):
    """The way of a batch's rows among the ranks of a group. Each rank takes part in all of it, whatever it has."""

    def there(self, x_RD: Tensor) -> Pending:
        """Rows leave for all ranks that hold experts of theirs; brings those that arrive here, [Q, D]."""

    def back(self, x_QD: Tensor) -> Pending:
        """What was made of them goes home; brings each row's sum over the ranks, [R, D]."""

    def arrived(self) -> Assigned:
        """The assignments of the rows that arrive, to experts numbered from this rank's first."""

    def scalars_back(self, x_U: Tensor) -> Pending:
        """A number for each assignment goes home, [A]."""


class AllToAll:
    """Each row goes once to each rank that holds any of its experts: rank p has the p-th run of `held` of them."""

    def __init__(self, assigned: Assigned, held: int, group: dist.ProcessGroup, traffic: Traffic) -> None:
        """Sizes go ahead; the host waits for them, once."""
        self._group, self._traffic, self._rows, ranks = group, traffic, assigned.rows, group.size()
        rank_A = assigned.expert_A // held
        self._order_A = order_A = rank_A.argsort(stable=True)  # by rank, and for each by row
        rank_A, row_A, expert_A = (x[order_A] for x in (rank_A, assigned.row_A, assigned.expert_A))
        begins_A = torch.ones_like(rank_A)
        begins_A[1:] = (rank_A[1:] != rank_A[:-1]) | (row_A[1:] != row_A[:-1])
        sent_P2 = torch.stack((rank_A.new_zeros(ranks).scatter_add_(0, rank_A, begins_A), counted(rank_A, ranks)), 1)
        sizes = _exchange(sent_P2, [1] * ranks, [1] * ranks, group, traffic)
        # What can be found without them, while they travel. There may be as many rows as assignments.
        row_A = torch.empty_like(row_A).scatter_(0, begins_A.cumsum(0) - 1, row_A)
        gate_A = assigned.gate_A.detach()[order_A]
        integers = INTEGERS[gate_A.dtype]
        words_A2 = torch.stack(((expert_A % held * 2 + begins_A).to(integers), gate_A.view(integers)), 1)
        (self._sent_P, self._words_sent_P), (self._received_P, self._words_received_P) = (
            counts_P2.t().tolist() for counts_P2 in torch.stack((sent_P2, sizes())).unbind()
        )
        self._words = _exchange(words_A2, self._words_received_P, self._words_sent_P, group, traffic)
        self._gate_dtype, self._most = gate_A.dtype, assigned.most
        self._row_S = row_A[: sum(self._sent_P)]
        self._place_S = self._row_S.argsort(stable=True)
        self._starts_R1 = F.pad(counted(self._row_S, self._rows).cumsum(0), (1, 0))
        traffic.rows += sum(self._received_P) - self._received_P[group.rank()]

    def there(self, x_RD: Tensor) -> Pending:
        return self._exchange(x_RD.index_select(0, self._row_S), self._received_P, self._sent_P)

    def back(self, x_QD: Tensor) -> Pending:
        found = self._exchange(x_QD, self._sent_P, self._received_P)
        return lambda: summed(found(), self._place_S, self._starts_R1)

    def arrived(self) -> Assigned:
        words_U2 = self._words()
        begins_U, rows = (words_U2[:, 0] & 1).long(), sum(self._received_P)
        row_U = begins_U.cumsum(0) - 1
        starts_Q1 = F.pad(counted(row_U, rows).cumsum(0), (1, 0))
        gate_U = words_U2[:, 1].contiguous().view(self._gate_dtype)
        return Assigned(row_U, (words_U2[:, 0] >> 1).long(), gate_U, starts_Q1, self._most * self._group.size())

    def scalars_back(self, x_U: Tensor) -> Pending:
        found = self._exchange(x_U, self._words_sent_P, self._words_received_P)
        return lambda: torch.empty_like(sent := found()).index_copy_(0, self._order_A, sent)

    def _exchange(self, x: Tensor, received_P: list[int], sent_P: list[int]) -> Pending:
        return _exchange(x, received_P, sent_P, self._group, self._traffic)


class AllGather:
    """Each row goes to all ranks, which take what they hold the experts of: more bytes, but the host waits for nothing,
    and no one for sizes. All ranks have as many rows.
    """

    def __init__(self, assigned: Assigned, held: int, group: dist.ProcessGroup, traffic: Traffic) -> None:
        self._group, self._traffic, self._held = group, traffic, held
        self._rows, self._count = assigned.rows, len(assigned.row_A)
        gate_A = assigned.gate_A.detach()
        self._gate_dtype, integers = gate_A.dtype, INTEGERS[gate_A.dtype]
        # As many words from each rank as there can be, the rest for no one's expert.
        words_A3 = torch.stack(
            (assigned.expert_A.to(integers), assigned.row_A.to(integers), gate_A.view(integers)), dim=1
        )
        self._most = assigned.most
        words_X3 = F.pad(words_A3, (0, 0, 0, self._most - self._count), value=-1)
        self._words = _gather(words_X3, group, traffic)
        traffic.rows += self._rows * (group.size() - 1)

    def there(self, x_RD: Tensor) -> Pending:
        return _gather(x_RD, self._group, self._traffic)

    def back(self, x_QD: Tensor) -> Pending:
        found = self._all_to_all(x_QD, self._rows)
        return lambda: found().unflatten(0, (-1, self._rows)).sum(0)

    def arrived(self) -> Assigned:
        ranks, first = self._group.size(), self._group.rank() * self._held
        expert_X, row_X, gate_X = self._words().unbind(1)
        self._index_U = ((expert_X >= first) & (expert_X < first + self._held)).nonzero().flatten()
        expert_U, row_U, gate_U = (x[self._index_U] for x in (expert_X, row_X, gate_X))
        row_U = row_U.long() + self._index_U // self._most * self._rows
        starts_Q1 = F.pad(counted(row_U, ranks * self._rows).cumsum(0), (1, 0))
        return Assigned(row_U, expert_U.long() - first, gate_U.view(self._gate_dtype), starts_Q1, self._most * ranks)

    def scalars_back(self, x_U: Tensor) -> Pending:
        """Each assignment is that of one rank: the others' zeros add nothing."""
        all_X = x_U.new_zeros(self._most * self._group.size()).index_copy_(0, self._index_U, x_U)
        found = self._all_to_all(all_X, self._most)
        return lambda: found().unflatten(0, (-1, self._most)).sum(0)[: self._count]

    def _all_to_all(self, x: Tensor, share: int) -> Pending:
        sizes = [share] * self._group.size()
        return _exchange(x, sizes, sizes, self._group, self._traffic)


def _exchange(
    x: Tensor, received_P: list[int], sent_P: list[int], group: dist.ProcessGroup, traffic: Traffic
) -> Pending:
    """Starts to send runs of so many rows to each rank, in order; brings what the ranks have sent, in theirs."""
    x, found = x.contiguous(), x.new_empty(sum(received_P), *x.shape[1:])
    work = dist.all_to_all_single(found, x, received_P, sent_P, group=group, async_op=True)
    traffic.bytes += (sum(received_P) - received_P[group.rank()]) * found[:1].numel() * x.itemsize

    def land() -> Tensor:
        work.wait()  # which holds what is sent until then
        return found

    return land


def _gather(x: Tensor, group: dist.ProcessGroup, traffic: Traffic) -> Pending:
    """Starts to send all to every rank; brings what each has sent, in the order of the ranks."""
    x, found = x.contiguous(), x.new_empty(group.size() * len(x), *x.shape[1:])
    work = dist.all_gather_single(found, x, group=group, async_op=True)
    traffic.bytes += (group.size() - 1) * x.numel() * x.itemsize

    def land() -> Tensor:
        work.wait()
        return found

    return land
