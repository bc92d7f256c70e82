"""Near-duplicates: signatures in which alike texts have equal numbers, and keys that alike texts share.

Sources: Broder, "On the resemblance and containment of documents", 1997 (signatures of shingles); Leskovec, Rajaraman
and Ullman, "Mining of Massive Datasets", section 3.4 (bands); Penedo et al., "The FineWeb Datasets", 2024, section 3.4
(shingles of 5 words, 14 bands of 8 hashes).
"""

# Shapes: D documents, S shingles of all of them, K hashes of a signature, B bands of R of them.

import numpy as np

from moray import UserError
from moray.data.curation.words import Words, mix

SHINGLE_WORDS = 5
N_HASHES = 112
NO_KEY = 0
"""The band key of a document without words, and of no other: it is alike to none, not even to one more like it."""

_NOTHING = np.uint32(0xFFFFFFFF)  # the least of no hashes
_CHUNK = 1 << 15  # shingles at a time: with their products 256 KiB, which a core's cache keeps for all K hashes
_NEAR = 0.05


def signatures(words: Words, n_hashes: int = N_HASHES) -> np.ndarray:
    """Of each document, the least value that each hash function has for its shingles: uint32 [D, K].

    `words` are those of folded texts. The share of places where two signatures are equal estimates the Jaccard index J
    of the texts' sets of shingles, with a variance of J (1 - J) / K. A signature depends on its text alone.
    Memory beyond the n-grams and the result: 256 KiB, and the result once more.
    """
    shingles, first = words.ngrams(SHINGLE_WORDS)
    factors = mix(np.arange(n_hashes, dtype=np.uint64)).astype(np.uint32) | np.uint32(1)
    least = np.full((n_hashes, len(first) - 1), _NOTHING)
    documents = np.flatnonzero(np.diff(first))  # those that have shingles
    begins = first[documents]
    products = np.empty(_CHUNK, np.uint32)
    for low in range(0, len(shingles), _CHUNK):
        # The hashes of shingles are mixed, so that half of each is as random as all of it, and twice as fast.
        part = (shingles[low : low + _CHUNK] >> np.uint64(32)).astype(np.uint32)
        here = slice(np.searchsorted(begins, low, "right") - 1, np.searchsorted(begins, low + len(part)))
        segments = np.maximum(begins[here] - low, 0)
        for row, factor in zip(least, factors, strict=True):
            # Multiply-shift (Dietzfelbinger et al. 1997): the high half of 64 bits, of which the low halves are zero.
            np.multiply(part, factor, out=products[: len(part)])
            found = np.minimum.reduceat(products[: len(part)], segments)
            row[documents[here]] = np.minimum(row[documents[here]], found)
    return np.ascontiguousarray(least.T)


def band_keys(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """Hashes of the first bands * rows places of signatures, `rows` at a time: uint64 [D, B] of uint32 [D, K].

    Two documents share a key of band b if they have equal numbers in all of its places. Keys of different bands differ.
    """
    keys = np.repeat(mix(np.arange(bands, dtype=np.uint64))[None], len(signatures), axis=0)
    for row in range(rows):
        keys = mix(keys ^ signatures[:, row : bands * rows : rows].astype(np.uint64))
    wordless = (signatures == _NOTHING).all(axis=1, keepdims=True)
    return np.where(wordless, np.uint64(NO_KEY), np.maximum(keys, np.uint64(NO_KEY + 1)))


def probability(jaccard: float, bands: int, rows: int) -> float:
    """That two texts of this Jaccard index share a key: 1 - (1 - J^r)^b (Leskovec et al., section 3.4.2)."""
    return 1 - (1 - jaccard**rows) ** bands


def threshold_of(bands: int, rows: int) -> float:
    """The Jaccard index, about, at which the probability rises most steeply: (1/b)^(1/r) (the same, section 3.4.3)."""
    return float((1 / bands) ** (1 / rows))


def banding(threshold: float, n_hashes: int = N_HASHES) -> tuple[int, int]:
    """Bands and rows whose threshold is nearest: for 0.72, FineWeb's 14 bands of 8.

    Of each number of rows, the most bands: the more hashes, the steeper the rise. n_hashes: 2 at least.
    Raises UserError where none comes near, naming those that come nearest.
    """
    choices = [(n_hashes // rows, rows) for rows in range(1, n_hashes // 2 + 1)]  # of one band, every hash must agree
    best = min(choices, key=lambda choice: abs(threshold_of(*choice) - threshold))
    if abs(threshold_of(*best) - threshold) > _NEAR:
        reached = [threshold_of(*choice) for choice in choices]
        below = [f"{max(less):.2f}"] if (less := [value for value in reached if value < threshold]) else []
        above = [f"{min(more):.2f}"] if (more := [value for value in reached if value > threshold]) else []
        raise UserError(
            f"threshold={threshold} is not reached with {n_hashes} hashes, which reach {min(reached):.2f} to "
            f"{max(reached):.2f}; try {' or '.join(below + above)}"
        )
    return best
