"""What is asked in held-out dialogues, and what people answered."""

from collections.abc import Iterator

import numpy as np

from moray.data.blocks import FIRST, BlockReader
from moray.data.dataset import Dataset
from moray.data.shards import TRAINED

READ_TOKENS = 1 << 16


def documents(dataset: Dataset, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and flags of the first documents of each shard, in file order; the last may be cut."""
    reader = BlockReader(dataset, split, cache_bytes=0)
    for shard in range(len(dataset.splits[split])):
        tokens, flags = reader.read(shard, 0, READ_TOKENS)
        starts = np.flatnonzero(flags & FIRST)
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            yield tokens[start:end], flags[start:end]


def exchanges(dataset: Dataset, split: str, room: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What stands before the first answer of a dialogue, of at most `room` tokens, and that answer."""
    for tokens, flags in documents(dataset, split):
        trained = flags & TRAINED > 0
        if trained.any() and (first := int(trained.argmax())) <= room:
            length = int((~trained[first:]).argmax()) or len(trained) - first
            yield tokens[:first], tokens[first : first + length]
