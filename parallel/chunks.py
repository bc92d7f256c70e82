"""Chunks of tensors, and whether some of them make up the whole. Needs no torch: nor does who reads a manifest."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Chunk = tuple[tuple[int, ...], tuple[int, ...]]
"""Where it begins in the tensor, and how long it is, by dimension."""


def whole(shape: Sequence[int]) -> Chunk:
    """The chunk that is all of a tensor."""
    return (0,) * len(shape), tuple(shape)


@dataclass(frozen=True)
class Grid:
    """The chunks that make up a tensor."""

    chunks: tuple[Chunk, ...]

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each begins and ends, int64 [chunks, dimensions] each."""
        starts = np.array([offsets for offsets, _ in self.chunks], np.int64).reshape(len(self.chunks), -1)
        sizes = np.array([sizes for _, sizes in self.chunks], np.int64).reshape(len(self.chunks), -1)
        return starts, starts + sizes

    def meeting(self, chunk: Chunk) -> list[int]:
        """Which of the chunks have an element in common with this one."""
        starts, ends = self._bounds
        start, size = (np.array(part, np.int64) for part in chunk)
        return np.flatnonzero(((starts < start + size) & (ends > start)).all(axis=1)).tolist()


def common(one: Chunk, other: Chunk) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What two chunks have in common, as a part of the first and as a part of the second."""
    parts = [(max(a, b), min(a + n, b + m), a, b) for a, n, b, m in zip(*one, *other, strict=True)]
    return (
        tuple(slice(start - a, stop - a) for start, stop, a, _ in parts),
        tuple(slice(start - b, stop - b) for start, stop, _, b in parts),
    )


def coverage_problem(shape: Sequence[int], chunks: Iterable[Chunk]) -> str | None:
    """Says where `chunks` leave a gap in a tensor of `shape`, overlap or stick out; None if exact.

    The edges of all chunks cut the tensor into a grid of cells, and each must lie in exactly one chunk: exact for any
    number of dimensions, and as cheap as the grid that shards form anyway.
    """
    chunks = list(chunks)
    for offsets, sizes in chunks:
        fits = len(offsets) == len(sizes) == len(shape)
        if not fits or any(o < 0 or s < 0 or o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            return f"the chunk at {offsets} of size {sizes} sticks out of shape {tuple(shape)}"
    edges = [
        sorted({0, n} | {offsets[d] for offsets, _ in chunks} | {offsets[d] + sizes[d] for offsets, sizes in chunks})
        for d, n in enumerate(shape)
    ]
    cell = [{edge: i for i, edge in enumerate(edges_of_dim)} for edges_of_dim in edges]
    count = np.zeros([len(edges_of_dim) - 1 for edges_of_dim in edges], dtype=np.int32)
    for offsets, sizes in chunks:
        count[
            tuple(slice(cell[d][o], cell[d][o + s]) for d, (o, s) in enumerate(zip(offsets, sizes, strict=True)))
        ] += 1
    wrong = np.argwhere(count != 1)
    if not len(wrong):
        return None
    where = tuple(int(i) for i in wrong[0])
    element = tuple(edges[d][i] for d, i in enumerate(where))
    return f"element {element} of shape {tuple(shape)} lies in {count[where]} chunks instead of one"
