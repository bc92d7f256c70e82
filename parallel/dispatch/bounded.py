"""The all-to-all where capacity bounds what an expert gets, so that all shapes are known: no host waits for a size."""

# Shapes: A assignments of R rows to experts, P ranks, W words that a rank has room for from each other one.

import torch
import torch.nn.functional as F
from torch import Tensor

from moray.model.moe.dispatch import Assigned, counted, kept, may_wait
from moray.parallel.dispatch.hops import AllToAll, Hop, by_rank, read_words, words_of
from moray.parallel.dispatch.wire import Pending, Wire


def all_to_all(assigned: Assigned, held: int, wire: Wire) -> Hop:
    """Exact sizes, for which the host waits once; bounds, where that would cost a GPU's time and there are some."""
    is_bounded = assigned.most_of_expert is not None and not may_wait(assigned.row_A.device)
    return (Bounded if is_bounded else AllToAll)(assigned, held, wire)


class Bounded(AllToAll):
    """Each rank has room for as many rows from each other one as its experts may take of them; what is left of it is
    filled with any.
    """

    def __init__(self, assigned: Assigned, held: int, wire: Wire) -> None:
        assert assigned.most_of_expert is not None
        self._wire, self._assigned, self._held, ranks = wire, assigned, held, wire.ranks
        limit, k = held * assigned.most_of_expert, assigned.most // max(assigned.rows, 1)
        self._room, self._words_room = min(assigned.rows, limit), min(assigned.rows * min(k, held), limit)
        self._sent_P = self._received_P = [self._room] * ranks
        self._words_sent_P = self._words_received_P = [self._words_room] * ranks
        self._order_A, rank_A, row_A, begins_A = by_rank(assigned, held)
        place_A = _places(begins_A, rank_A, ranks, self._room)
        self._word_A = _places(torch.ones_like(rank_A), rank_A, ranks, self._words_room)
        self._row_S = row_A.new_zeros(ranks * self._room + 1).scatter_(0, place_A, row_A)[:-1]
        words_A2 = words_of(assigned, self._order_A, begins_A, held)
        words_X2 = words_A2.new_full((ranks * self._words_room + 1, 2), -1).index_copy_(0, self._word_A, words_A2)[:-1]
        self._words = wire.all_to_all(words_X2, self._words_received_P, self._words_sent_P)
        # Each row's places, in the order of the rows.
        row_A = torch.where((begins_A == 1) & (rank_A < ranks), row_A, assigned.rows)
        self._place_S = place_A[row_A.argsort(stable=True)].clamp(max=max(ranks * self._room - 1, 0))
        self._starts_R1 = F.pad(counted(row_A, assigned.rows + 1)[:-1].cumsum(0), (1, 0))
        wire.traffic.rows += self._room * (ranks - 1)

    def arrived(self) -> Assigned:
        words_X2, ranks = self._words(), self._wire.ranks
        is_kept_X = words_X2[:, 0] >= 0
        begins_PW = (is_kept_X & ((words_X2[:, 0] & 1) == 1)).view(ranks, -1)
        first_P1 = torch.arange(ranks, device=begins_PW.device)[:, None] * self._room
        row_X = (first_P1 + begins_PW.cumsum(1) - 1).clamp(min=0).flatten()
        unknown_Q1 = row_X.new_empty(ranks * self._room + 1)
        every = self._assigned.of_ranks(ranks, row_X, *read_words(words_X2), unknown_Q1)
        found, self._index_U = kept(every, is_kept_X, self._held)
        return found

    def scalars_back(self, x_U: Tensor) -> Pending:
        room_X = x_U.new_zeros(self._wire.ranks * self._words_room).index_copy_(0, self._index_U, x_U)
        found = self._wire.all_to_all(room_X, self._words_sent_P, self._words_received_P)

        def land() -> Tensor:
            of_words_A = F.pad(found(), (0, 1)).index_select(0, self._word_A)
            return torch.empty_like(of_words_A).index_copy_(0, self._order_A, of_words_A)

        return land


def _places(counted_A: Tensor, rank_A: Tensor, ranks: int, room: int) -> Tensor:
    """Where in the ranks' rooms, one behind the other, each is that is counted (1; 0: where the one before it is);
    what is no rank's, behind them all.
    """
    of_ranks = rank_A.new_zeros(ranks + 1).scatter_add_(0, rank_A, counted_A)
    before_A = (of_ranks.cumsum(0) - of_ranks).index_select(0, rank_A)
    return (counted_A.cumsum(0) - 1 - before_A + rank_A * room).clamp(max=ranks * room)
