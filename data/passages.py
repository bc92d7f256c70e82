"""Which documents some tokens of a shard belong to: from a place in the data back to the file that it came from."""

from dataclasses import dataclass

import numpy as np

from moray.data.blocks import BlockReader
from moray.data.index import Shard


@dataclass(frozen=True)
class Passage:
    """What some tokens are of one document: tokens [start, stop) of `length`, in a block whose tokens.npy is at `byte`.

    sample: the block's key in the shard.
    """

    key: str
    start: int
    stop: int
    length: int
    sample: str
    byte: int


def passages(reader: BlockReader, shard: Shard, number: int, start: int, stop: int) -> list[Passage]:
    """The parts of documents that tokens [start, stop) of a shard are, one after another; `number` is the shard's.

    Raises UserError as `BlockReader.read` does. Reads the names alone, of the blocks concerned.
    """
    starts, found = shard.starts, []
    first = int(np.searchsorted(starts, start, side="right")) - 1
    for block in range(first, int(np.searchsorted(starts, stop, side="left"))):
        keys, ends = reader.documents(number, block)
        sample = shard.sample(block)
        bounds = starts[block] + np.concatenate([[0], ends])
        for key, begin, end in zip(keys, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            low, high = max(begin, start), min(end, stop)
            if low < high:
                place = low - begin, high - begin, end - begin
                found.append(Passage(key, *place, sample.key, sample.tokens.offset))
    return found
