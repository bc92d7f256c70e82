"""The words of a batch of texts and hashes of any run of them, found at once for all (numpy; no Python per word).

A word is a run of letters and digits with the marks that follow them; in scripts without spaces (Han, Kana, Thai, Lao,
Khmer, Burmese) each letter is a word. Hashes are our own and fixed: no upgrade of a library can change what counts as
a duplicate.
"""

# Shapes: D texts, C code points of all of them, W words of all of them.

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

SEPARATOR, LETTER, DIGIT, MARK, ALONE = range(5)
"""What a code point is to words; an ALONE one is a word by itself, with the marks that follow it."""

BASE = 0x9E3779B97F4A7C15  # odd: it has an inverse modulo 2^64
_INVERSE = pow(BASE, -1, 1 << 64)
_KEPT_POWERS = 1 << 21  # of both together 32 MiB, which batches of usual size ask for again and again
_JOIN = 0xD1342543DE82EF95  # odd: the base of runs of words

_BATCH = 1 << 19  # code points: larger ones leave a core's cache, and take half as long again

_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # Han's iteration mark, closing mark and zero
    (0x3040, 0x30FF),  # Kana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # half-width Kana
    (0x20000, 0x3FFFF),
)


@dataclass(frozen=True, eq=False)
class Words:
    """The words of some texts, one text after another.

    codes: uint32 [C], the code points. text_ends: int64 [D], where each text ends among them. starts, ends: int64 [W],
    where each word does. first: int64 [D + 1], the words of text d are first[d] to first[d + 1].
    """

    codes: np.ndarray
    text_ends: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Words":
        codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        text_ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        kinds = kinds_of(codes)
        begins_text = np.zeros(len(codes) + 1, bool)
        begins_text[text_ends] = True
        begins_text = begins_text[:-1]
        # A mark goes on with what it stands behind; behind nothing of a word, or first in its text, it is none.
        marks = kinds == MARK
        if marks.any():
            last = np.maximum.accumulate(np.where(~marks | begins_text, np.arange(len(codes)), 0))
            kinds = np.where(marks, np.where(kinds[last] == MARK, SEPARATOR, kinds[last]), kinds)
        within = kinds != SEPARATOR
        begins = within & begins_text
        begins[:1] |= within[:1]
        # A letter of an unspaced script begins a word, and so does what follows one and its marks.
        alone = kinds == ALONE
        begins[1:] |= within[1:] & (~within[:-1] | ((alone[1:] | alone[:-1]) & ~marks[1:]))
        is_last = within.copy()
        is_last[:-1] &= ~within[1:] | begins[1:] | begins_text[1:]
        starts, ends = np.flatnonzero(begins), np.flatnonzero(is_last) + 1
        first = np.concatenate([[0], np.searchsorted(starts, text_ends)])
        return cls(codes, text_ends, starts, ends, first)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """Code points of each word, int64 [W]."""
        return self.ends - self.starts

    @property
    def counts(self) -> np.ndarray:
        """Words of each text, int64 [D]."""
        return np.diff(self.first)

    @cached_property
    def hashes(self) -> np.ndarray:
        """Of each word, uint64 [W]: equal for equal words, wherever they stand."""
        return spans(self.codes, self.starts, self.ends)

    def ngrams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of each n words in a row of one text, and where each text's begin: uint64 [N], int64 [D + 1].

        A text of fewer words, but of one at least, has one: of all its words.
        """
        return runs(self.hashes, self.first, n)


def folded_words(texts: Iterable[str]) -> Iterator[Words]:
    """The words of texts as they are compared (see `folded`), some at a time: 2^19 code points, or one longer text.

    Memory: about 60 bytes for each of those code points.
    """
    batch, size = list[str](), 0
    for text in texts:
        if batch and size + len(text) > _BATCH:
            yield Words.of(batch)
            batch, size = [], 0
        batch.append(folded(text))
        size += len(text)
    if batch:
        yield Words.of(batch)


def kinds_of(codes: np.ndarray) -> np.ndarray:
    """SEPARATOR, LETTER, DIGIT, MARK or ALONE of each code point; uint8, shaped as `codes`."""
    return _table()[codes]


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    by_category = {"L": LETTER, "N": DIGIT, "M": MARK}
    table = np.array(
        [by_category.get(unicodedata.category(chr(code))[0], SEPARATOR) for code in range(0x110000)], np.uint8
    )
    for low, high in _UNSPACED:
        part = table[low : high + 1]
        part[part == LETTER] = ALONE
    return table


def folded(text: str) -> str:
    """The text as it is compared: in capitals or not, in full-width forms or not, is all the same."""
    return unicodedata.normalize("NFKC", text).casefold()


def spans(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Hashes of codes[start:end] for each of the spans, uint64: in constant time each, by sums of prefixes.

    The hash is the polynomial sum of (code + 1) * BASE^i modulo 2^64 over the span, mixed by splitmix64.
    """
    with np.errstate(over="ignore"):
        powers = _powers(BASE, len(codes))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * powers)])
        inverse = _powers(_INVERSE, len(codes) + 1)
        return mix((sums[ends] - sums[starts]) * inverse[starts])


def runs(hashes: np.ndarray, first: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """As `Words.ngrams`, of things of any kind that have hashes: those of part d are first[d] to first[d + 1]."""
    counts = np.diff(first)
    n_runs = np.where(counts >= n, counts - n + 1, (counts > 0).astype(np.int64))
    run_first = np.concatenate([[0], np.cumsum(n_runs)])
    part = np.repeat(np.arange(len(counts)), n_runs)
    starts = first[part] + np.arange(run_first[-1]) - run_first[part]
    lengths = np.minimum(counts[part], n)
    shortest = int(lengths.min(initial=n))
    with np.errstate(over="ignore"):
        total = np.zeros(len(starts), np.uint64)
        for offset in range(n):
            # Horner's rule.
            step = total * np.uint64(_JOIN) + hashes[np.minimum(starts + offset, max(len(hashes) - 1, 0))]
            total = step if offset < shortest else np.where(offset < lengths, step, total)
        return mix(total ^ lengths.astype(np.uint64)), run_first


def mix(x: np.ndarray) -> np.ndarray:
    """One step of splitmix64 on each uint64. Source: Steele, Lea and Flood, OOPSLA 2014, figure 16."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _powers(base: int, n: int) -> np.ndarray:
    """base^0 to base^(n - 1) modulo 2^64, uint64."""
    return _kept_powers(base)[:n] if n <= _KEPT_POWERS else _new_powers(base, n)


@lru_cache(maxsize=2)
def _kept_powers(base: int) -> np.ndarray:
    return _new_powers(base, _KEPT_POWERS)


def _new_powers(base: int, n: int) -> np.ndarray:
    factors = np.full(n, base, np.uint64)
    factors[0] = 1
    with np.errstate(over="ignore"):
        return np.cumprod(factors)
