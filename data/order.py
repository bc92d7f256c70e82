"""Where a position of the stream lies in the data: pure functions of (seed, position), the whole of law 2.

An epoch visits every sequence of a split once. Its shards are permuted by (seed, epoch); the sequences are permuted
within each window of a few shards, so that a reader's working set stays small. No generator, no memory beyond the list
of shards, no state but that list's order in an epoch: the permutations are Feistel networks over splitmix64, which no
library upgrade can change.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

# 4 full shards are 128 MiB of uint16 tokens, or 256 MiB of uint32: what the stream's cache holds by default.
WINDOW_SHARDS = 4
ROUNDS = 8
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Places:
    """Where positions lie: int64 arrays of one value each."""

    epochs: np.ndarray
    shards: np.ndarray  # index of the shard in file order
    sequences: np.ndarray  # index of the sequence within the shard


def sequence_counts(shard_tokens: npt.ArrayLike, seq_len: int) -> np.ndarray:
    """Sequences in each shard, int64 [shards]: every token after a shard's first is the target of exactly one."""
    return -(-(np.asarray(shard_tokens, np.int64) - 1) // seq_len)


class Order:
    """The order of a split's sequences, epoch after epoch.

    What all positions of an epoch share, the permutation of its shards, is made once for each of the last two: a batch
    may straddle them.
    """

    def __init__(self, counts: np.ndarray, seed: int, window_shards: int = WINDOW_SHARDS) -> None:
        """Counts: int64 [shards], from `sequence_counts`."""
        self.epoch_length = int(counts.sum())
        self._epoch = lru_cache(maxsize=2)(lambda epoch: _Epoch.of(counts, derive_key(seed, epoch), window_shards))

    def locate(self, positions: np.ndarray) -> Places:
        """Epoch, shard and sequence at each position of the stream.

        Shapes: positions int64 [N], not negative; the result's arrays [N].
        """
        epochs, within = np.divmod(positions, self.epoch_length)
        shards, sequences = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            shards[here], sequences[here] = self._epoch(epoch).locate(within[here])
        return Places(epochs, shards, sequences)


@dataclass(frozen=True)
class _Epoch:
    key: int
    order: np.ndarray  # the epoch's shards
    starts: np.ndarray  # of each shard, in the epoch's order
    window_starts: np.ndarray

    @classmethod
    def of(cls, counts: np.ndarray, key: int, window_shards: int) -> "_Epoch":
        order = permute(np.arange(len(counts)), len(counts), derive_key(key, 0))
        starts = np.concatenate([[0], np.cumsum(counts[order])])
        return cls(key, order, starts, starts[[*range(0, len(counts), window_shards), len(counts)]])

    def locate(self, within: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        windows = np.searchsorted(self.window_starts, within, side="right") - 1
        shuffled = np.empty_like(within)
        for window in np.unique(windows).tolist():
            here = windows == window
            first, end = self.window_starts[window : window + 2].tolist()
            shuffled[here] = first + permute(within[here] - first, end - first, derive_key(self.key, 1 + window))
        ranks = np.searchsorted(self.starts, shuffled, side="right") - 1
        return self.order[ranks], shuffled - self.starts[ranks]


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Images of indices under the bijection of range(size) that `key` chooses; int64 in and out.

    A Feistel network over the next power of two, applied again to what falls outside (cycle walking: fewer than two
    rounds on average). Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 3.
    """
    image = _feistel(index.astype(np.uint64), size, key)
    while (outside := image >= size).any():
        image[outside] = _feistel(image[outside], size, key)
    return image.astype(np.int64)


def _feistel(x: np.ndarray, size: int, key: int) -> np.ndarray:
    bits = (size - 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = x & low_mask, x >> low_bits
    round_keys = _mix(_mix(np.array([key], np.uint64)) ^ np.arange(ROUNDS, dtype=np.uint64))
    for number, round_key in enumerate(round_keys):
        # Alternating sides need not be of equal width: each half is only ever xored with a function of the other.
        if number % 2:
            low = low ^ (_mix(high ^ round_key) & low_mask)
        else:
            high = high ^ (_mix(low ^ round_key) & high_mask)
    return (high << low_bits) | low


def derive_key(*numbers: int) -> int:
    """64 bits that depend on all the numbers and their order."""
    state = 0
    for number in numbers:
        state = int(_mix(np.array([state ^ (number & _MASK)], np.uint64))[0])
    return state


def _mix(x: np.ndarray) -> np.ndarray:
    """One step of splitmix64 on each uint64. Source: Steele, Lea and Flood, OOPSLA 2014, figure 16."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
