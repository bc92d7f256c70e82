"""One exchange of tokens among the ranks of a group: there, to ranks that hold experts of theirs, and back, as sums.

A hop knows no gradients: going back is the transpose of going there, and `route` uses either for both.
"""

# Shapes: R rows that leave this rank, each once for every rank that holds experts of it: S in all; Q rows that arrive;
# A assignments of the R rows to experts, U those of the Q rows to experts here; D model width, P ranks.

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moray.model.moe.dispatch import Assigned, counted, kept, summed
from moray.parallel.dispatch.wire import Pending, Wire

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


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

    def __init__(self, assigned: Assigned, held: int, wire: Wire) -> None:
        """Sizes go ahead; the host waits for them, once."""
        self._wire, self._assigned, ranks = wire, assigned, wire.ranks
        self._order_A, rank_A, row_A, begins_A = by_rank(assigned, held)
        # Behind the ranks stands what is no assignment.
        rows_P1, words_P1 = rank_A.new_zeros(ranks + 1).scatter_add_(0, rank_A, begins_A), counted(rank_A, ranks + 1)
        sent_P2 = torch.stack((rows_P1, words_P1), 1)[:-1]
        sizes = wire.all_to_all(sent_P2, [1] * ranks, [1] * ranks)
        # What can be found without them, while they travel. There may be as many rows as assignments.
        row_A = torch.empty_like(row_A).scatter_(0, begins_A.cumsum(0) - 1, row_A)
        words_A2 = words_of(assigned, self._order_A, begins_A, held)
        (self._sent_P, self._words_sent_P), (self._received_P, self._words_received_P) = torch.stack(
            (sent_P2, sizes())
        ).mT.tolist()
        self._words = wire.all_to_all(words_A2[: sum(self._words_sent_P)], self._words_received_P, self._words_sent_P)
        self._row_S = row_A[: sum(self._sent_P)]
        self._place_S = self._row_S.argsort(stable=True)
        self._starts_R1 = F.pad(counted(self._row_S, assigned.rows).cumsum(0), (1, 0))
        wire.traffic.rows += sum(self._received_P) - self._received_P[wire.rank]

    def there(self, x_RD: Tensor) -> Pending:
        return self._wire.all_to_all(x_RD.index_select(0, self._row_S), self._received_P, self._sent_P)

    def back(self, x_QD: Tensor) -> Pending:
        found = self._wire.all_to_all(x_QD, self._sent_P, self._received_P)
        return lambda: summed(found(), self._place_S, self._starts_R1)

    def arrived(self) -> Assigned:
        words_U2, rows = self._words(), sum(self._received_P)
        row_U = (words_U2[:, 0] & 1).long().cumsum(0) - 1
        starts_Q1 = F.pad(counted(row_U, rows).cumsum(0), (1, 0))
        return self._assigned.of_ranks(self._wire.ranks, row_U, *read_words(words_U2), starts_Q1)

    def scalars_back(self, x_U: Tensor) -> Pending:
        found = self._wire.all_to_all(x_U, self._words_sent_P, self._words_received_P)
        order_A = self._order_A[: sum(self._words_sent_P)]
        return lambda: x_U.new_zeros(len(self._order_A)).index_copy_(0, order_A, found())


class AllGather:
    """Each row goes to all ranks, which take what they hold the experts of: more bytes, but no sizes to wait for. All
    ranks have as many rows.
    """

    def __init__(self, assigned: Assigned, held: int, wire: Wire) -> None:
        self._wire, self._assigned, self._held = wire, assigned, held
        expert_A, row_A, gate_A = assigned.expert_A, assigned.row_A, assigned.gate_A
        integers = INTEGERS[gate_A.dtype]
        words_A3 = torch.stack((expert_A.to(integers), row_A.to(integers), gate_A.view(integers)), 1)
        # As many words from each rank as there can be, the rest for no one's expert.
        self._words = wire.all_gather(F.pad(words_A3, (0, 0, 0, assigned.most - len(row_A)), value=-1))
        wire.traffic.rows += assigned.rows * (wire.ranks - 1)

    def there(self, x_RD: Tensor) -> Pending:
        return self._wire.all_gather(x_RD)

    def back(self, x_QD: Tensor) -> Pending:
        return self._sums_back(x_QD, self._assigned.rows)

    def arrived(self) -> Assigned:
        words_X3, rows = self._words(), self._assigned.rows
        expert_X = words_X3[:, 0].long() - self._wire.rank * self._held
        source_X = torch.arange(len(words_X3), device=words_X3.device) // self._assigned.most
        row_X = words_X3[:, 1].long().clamp(min=0) + source_X * rows
        gate_X = words_X3[:, 2].contiguous().view(self._assigned.gate_A.dtype)
        unknown_Q1 = row_X.new_empty(self._wire.ranks * rows + 1)
        every = self._assigned.of_ranks(self._wire.ranks, row_X, expert_X, gate_X, unknown_Q1)
        found, self._index_U = kept(every, (expert_X >= 0) & (expert_X < self._held), self._held)
        return found

    def scalars_back(self, x_U: Tensor) -> Pending:
        """Each assignment is that of one rank: the others' zeros add nothing."""
        most = self._assigned.most
        all_X = x_U.new_zeros(most * self._wire.ranks).index_copy_(0, self._index_U, x_U)
        found = self._sums_back(all_X, most)
        return lambda: found()[: len(self._assigned.row_A)]

    def _sums_back(self, x: Tensor, share: int) -> Pending:
        found = self._wire.all_to_all(x, [share] * self._wire.ranks, [share] * self._wire.ranks)
        return lambda: found().unflatten(0, (-1, share)).sum(0)


def by_rank(assigned: Assigned, held: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assignments in the order of the ranks that hold their experts, and for each of the rows: which they are, the
    ranks, the rows, and 1 where a row begins for a rank (int64, [A] each).
    """
    rank_A = assigned.expert_A // held
    order_A = rank_A.argsort(stable=True)
    rank_A, row_A = rank_A[order_A], assigned.row_A[order_A]
    begins_A = torch.ones_like(rank_A)
    begins_A[1:] = (rank_A[1:] != rank_A[:-1]) | (row_A[1:] != row_A[:-1])
    return order_A, rank_A, row_A, begins_A


def words_of(assigned: Assigned, order_A: Tensor, begins_A: Tensor, held: int) -> Tensor:
    """What a rank must know of each assignment, in this order, [A, 2]: its expert there and whether a row begins, and
    the bits of its gate.
    """
    gate_A = assigned.gate_A[order_A]
    integers = INTEGERS[gate_A.dtype]
    return torch.stack(((assigned.expert_A[order_A] % held * 2 + begins_A).to(integers), gate_A.view(integers)), 1)


def read_words(words_U2: Tensor) -> tuple[Tensor, Tensor]:
    """Experts and gates."""
    gates = {integers: dtype for dtype, integers in INTEGERS.items()}
    return (words_U2[:, 0] >> 1).long(), words_U2[:, 1].contiguous().view(gates[words_U2.dtype])
