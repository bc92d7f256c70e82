"""A set of hashes in fixed memory, which may think of a new hash that it was there, and never that an old one was not.

Sources: Bloom, "Space/time trade-offs in hash coding with allowable errors", 1970; Kirsch and Mitzenmacher, "Less
hashing, same performance", 2006 (places h1 + i h2).
"""

# Shapes: N hashes, K places of each.

import math

import numpy as np

from moray import UserError
from moray.data.curation.words import mix

_CHUNK_BITS = 14  # hashes at a time: their places, some megabytes, are sorted within a core's cache


class Bloom:
    """`n_bits` bits, a power of two, of which each hash sets `n_places`. Memory: n_bits / 8 bytes."""

    def __init__(self, n_bits: int, n_places: int) -> None:
        assert n_bits in (1 << power for power in range(3, 50)), n_bits  # a place and a turn share 64 bits
        self.n_bits, self.n_places = n_bits, n_places
        self.bytes = np.zeros(n_bits // 8, np.uint8)

    @classmethod
    def sized(cls, n: int, rate: float) -> "Bloom":
        """For `n` hashes, after which a new one is thought old at most at this rate.

        m = -n ln p / (ln 2)^2 bits, up to a power of two, and m/n ln 2 places: the rate is least.
        Raises UserError for a rate that is none.
        """
        if not 0 < rate < 1:
            raise UserError(f"rate={rate} of hashes that are thought old must lie between 0 and 1, for example 0.001")
        needed = -max(n, 1) * math.log(rate) / math.log(2) ** 2
        n_bits = 1 << max(3, math.ceil(math.log2(needed)))
        return cls(n_bits, max(1, round(n_bits / max(n, 1) * math.log(2))))

    def false_positive_rate(self, n: int) -> float:
        """Of a filter that holds `n` hashes: (1 - e^(-kn/m))^k."""
        return float((1 - math.exp(-self.n_places * n / self.n_bits)) ** self.n_places)

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Adds uint64 [N] one after another; bool [N]: whether each was there when its turn came, or seems so."""
        chunk = 1 << _CHUNK_BITS
        parts = [self._add(hashes[low : low + chunk]) for low in range(0, len(hashes), chunk)]
        return np.concatenate([np.zeros(0, bool), *parts])

    def _add(self, hashes: np.ndarray) -> np.ndarray:
        places_NK = self._places(hashes)
        unset = (self.bytes[places_NK >> 3] >> (places_NK & 7).astype(np.uint8)) & 1 == 0
        # Sorted by place and then by turn, the first of each place is whose turn sets it, and who is then new.
        turn = np.nonzero(unset)[0]
        by_place = np.sort(places_NK[unset] << _CHUNK_BITS | turn)
        setting = by_place[np.diff(by_place >> _CHUNK_BITS, prepend=-1) != 0]
        places = setting >> _CHUNK_BITS
        np.bitwise_or.at(self.bytes, places >> 3, np.uint8(1) << (places & 7).astype(np.uint8))
        was_there = np.ones(len(hashes), bool)
        was_there[setting & ((1 << _CHUNK_BITS) - 1)] = False
        return was_there

    def _places(self, hashes: np.ndarray) -> np.ndarray:
        """int64 [N, K]. Hashes are mixed again: those of one partition may have bits in common."""
        start = mix(hashes)
        step = mix(start) | np.uint64(1)  # odd: a hash meets no place twice before it has met all
        number = np.arange(self.n_places, dtype=np.uint64)
        places = start[:, None] + number * step[:, None]
        return (places & np.uint64(self.n_bits - 1)).astype(np.int64)
