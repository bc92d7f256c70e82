"""Things one after another in lists of about so many bytes: what is done at once costs little a thing."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

BATCH_BYTES = 1 << 20

T = TypeVar("T")


def batches(things: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of BATCH_BYTES, or of one thing more than that; the last one of what is left. size_of: bytes, about."""
    batch: list[T] = []
    size = 0
    for thing in things:
        batch.append(thing)
        size += size_of(thing)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
