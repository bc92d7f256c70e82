"""Passes of an evaluation, shared by ranks that hold a spread model: all take equally many, of equal shapes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch.distributed as dist

R = TypeVar("R")


class Pass(NamedTuple):
    """Which sequences go through together, in a batch of so many rows and so wide, padding included."""

    indices: list[int]
    rows: int
    width: int


@dataclass(frozen=True)
class Ranks:
    """This data-parallel rank of `size`; tp: how many hold the same sequences, in slices."""

    rank: int = 0
    size: int = 1
    tp: int = 1
    on_pass: Callable[[], None] = lambda: None

    @property
    def are_several(self) -> bool:
        return self.size * self.tp > 1

    def passes(self, lengths: Sequence[int], batch_tokens: int) -> Iterator[tuple[list[Pass], int]]:
        """Those that are taken side by side, one a rank, and which of them is this rank's.

        Sequences of about the same length, the longest first: what memory cannot hold fails at once. Ranks that are
        left over take the last pass along, for whose result nobody asks.
        """
        groups = list(_batches(lengths, batch_tokens))
        for start in range(0, len(groups), self.size):
            side = groups[start : start + self.size]
            rows = max(map(len, side))
            width = -(-max(lengths[group[0]] for group in side) // self.tp) * self.tp
            yield [Pass(group, rows, width) for group in side], min(self.rank, len(side) - 1)

    def share(self, lengths: Sequence[int], batch_tokens: int, compute: Callable[[Pass], Sequence[R]]) -> list[R]:
        """A result for each sequence, in their order, on every rank. Collective."""
        own: list[tuple[int, R]] = []
        for side, mine in self.passes(lengths, batch_tokens):
            own += zip(side[mine].indices, compute(side[mine]), strict=True)
            self.on_pass()
        found = [own]
        if self.are_several:
            found = [own] * dist.get_world_size()
            dist.all_gather_object(found, own)
        by_index = {index: result for each in found for index, result in each}
        return [by_index[index] for index in range(len(lengths))]


ALONE = Ranks()


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        rows = max(batch_tokens // max(lengths[order[start]], 1), 1)
        yield order[start : start + rows]
        start += rows
