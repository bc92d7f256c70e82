"""The words of a batch of texts and hashes of any run of them, found at once for all (numpy; no Python per word).

A word is a run of letters and digits with the marks that follow them; in scripts without spaces (Han, Kana, Thai, Lao,
Khmer, Burmese) each letter is a word. Hashes are our own and fixed: no upgrade of a library can change what counts as
a duplicate.
"""

# Shapes: D texts, W words of all of them.

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

SEPARATOR, LETTER, DIGIT, MARK, ALONE = range(5)
"""What a code point is to words; an ALONE one is a word by itself, with the marks that follow it."""

BASE = 0x9E3779B97F4A7C15  # odd: it has an inverse modulo 2^64
_INVERSE = pow(BASE, -1, 1 << 64)
_JOIN = 0xD1342543DE82EF95  # odd: the base of runs of words

STRETCH = 1 << 19
"""Things that are worked on at a time: more leave a core's cache and take half as long again, and of a long text would
take many times its size.
"""

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

    text: all of them, joined. text_ends: int64 [D], where each text ends in it. starts, ends: [W], where each word
    does, int32 where that is enough. first: int64 [D + 1], the words of text d are first[d] to first[d + 1].
    Memory: 8 bytes a word, 8 more for its hash, and STRETCH code points at a time, however long a text is.
    """

    text: str
    text_ends: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Words":
        text = "".join(texts)
        text_ends = np.cumsum([len(each) for each in texts], dtype=np.int64)
        starts, ends, low, before = [], [], 0, SEPARATOR  # before: the kind of what the last stretch ended in
        place = np.dtype(np.int32 if len(text) < 1 << 31 else np.int64)
        for codes in codes_of(text):
            begins_text = np.zeros(len(codes), bool)
            begins_text[_within(text_ends, low, len(codes))] = True
            kinds = np.concatenate([[np.uint8(before)], kinds_of(codes)])
            # A mark goes on with what it stands behind; behind nothing of a word, or first in its text, it is none.
            marks = kinds == MARK
            if marks.any():
                keeps = np.concatenate([[True], ~marks[1:] | begins_text])
                last = np.maximum.accumulate(np.where(keeps, np.arange(len(kinds)), 0))
                kinds = np.where(marks, np.where(kinds[last] == MARK, SEPARATOR, kinds[last]), kinds)
            within, alone = kinds != SEPARATOR, kinds == ALONE
            # A letter of an unspaced script begins a word, and so does what follows one and its marks.
            is_new = begins_text | ~within[:-1] | ((alone[1:] | alone[:-1]) & ~marks[1:])
            starts.append((low + np.flatnonzero(within[1:] & is_new)).astype(place))
            ends.append((low + np.flatnonzero(within[:-1] & (is_new | ~within[1:]))).astype(place))
            low, before = low + len(codes), kinds[-1]
        ends.append(np.array([low] if before != SEPARATOR else [], place))
        starts_W, ends_W = np.concatenate([np.zeros(0, place), *starts]), np.concatenate(ends)
        # Of one type: or the words' would be converted, all of them.
        first = np.concatenate([[0], np.searchsorted(starts_W, text_ends.astype(place))])
        return cls(text, text_ends, starts_W, ends_W, first)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """Code points of each word, [W]."""
        return self.ends - self.starts

    @property
    def counts(self) -> np.ndarray:
        """Words of each text, int64 [D]."""
        return np.diff(self.first)

    @property
    def text_first(self) -> np.ndarray:
        """The code points of text d are text_first[d] to text_first[d + 1]; int64 [D + 1]."""
        return np.concatenate([[0], self.text_ends])

    @cached_property
    def hashes(self) -> np.ndarray:
        """Of each word, uint64 [W]: equal for equal words, wherever they stand."""
        return spans(codes_of(self.text), self.starts, self.ends)

    def ngrams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of each n words in a row of one text, and where each text's begin: uint64 [N], int64 [D + 1].

        A text of fewer words, but of one at least, has one: of all its words.
        """
        return runs(self.hashes, self.first, n)


def codes_of(text: str) -> Iterator[np.ndarray]:
    """The code points of a text, uint32, STRETCH at a time."""
    for low in range(0, len(text), STRETCH):
        yield np.frombuffer(text[low : low + STRETCH].encode("utf-32-le", "surrogatepass"), np.uint32)


def pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    """An array, STRETCH at a time."""
    return (values[low:high] for low, high in stretches(len(values)))


def stretches(n: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each STRETCH of n things."""
    return ((low, min(low + STRETCH, n)) for low in range(0, n, STRETCH))


def parts_of(first: np.ndarray, low: int, high: int) -> np.ndarray:
    """Of things that lie part after part, those of part d from first[d] to first[d + 1]: the part of each of the things
    `low` to `high`, int64.
    """
    begin, end = np.searchsorted(first, low, "right") - 1, np.searchsorted(first, high)
    return np.repeat(np.arange(begin, end), np.diff(first[begin : end + 1].clip(low, high)))


def _within(places: np.ndarray, low: int, n: int) -> np.ndarray:
    """Those of sorted places that are among the n from `low` on, counted from there."""
    begin, end = np.searchsorted(places, [low, low + n])
    return places[begin:end] - low


def folded_words(texts: Iterable[str]) -> Iterator[Words]:
    """The words of texts as they are compared (see `folded`), some at a time: STRETCH code points, or a longer text."""
    batch, size = list[str](), 0
    for text in texts:
        if batch and size + len(text) > STRETCH:
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


def spans(values: Iterable[np.ndarray], starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Hashes of values[start:end] for each of the spans, uint64: in constant time each, by sums of prefixes.

    values: STRETCH at a time. Neither the starts nor the ends may go back.
    The hash is the polynomial sum of (value + 1) * BASE^i modulo 2^64 over the span, mixed by splitmix64.
    """
    total, low = np.zeros(len(starts), np.uint64), 0
    with np.errstate(over="ignore"):
        for part in values:
            high = low + len(part)
            powers, inverse = _powers(BASE, len(part)), _powers(_INVERSE, len(part) + 1)
            sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((part.astype(np.uint64) + np.uint64(1)) * powers)])
            here = slice(_place(ends, low, "right"), _place(starts, high, "left"))
            begins = np.maximum(starts[here], low) - low
            found = (sums[np.minimum(ends[here], high) - low] - sums[begins]) * inverse[begins]
            # What began before goes on here, at a higher power.
            begun = starts[here][: _place(starts[here], low, "left")].tolist()
            found[: len(begun)] *= np.array([pow(BASE, low - start, 1 << 64) for start in begun], np.uint64)
            total[here] += found
            low = high
        for part in pieces(total):
            part[:] = mix(part)
    return total


def _place(places: np.ndarray, place: int, side: Literal["left", "right"]) -> int:
    """Of the places' own type: or all of them would be converted."""
    return int(np.searchsorted(places, places.dtype.type(place), side))


def runs(hashes: np.ndarray, first: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """As `Words.ngrams`, of things of any kind that have hashes: those of part d are first[d] to first[d + 1]."""
    counts = np.diff(first)
    n_runs = np.where(counts >= n, counts - n + 1, (counts > 0).astype(np.int64))
    run_first = np.concatenate([[0], np.cumsum(n_runs)])
    found = np.empty(int(run_first[-1]), np.uint64)
    for low, high in stretches(len(found)):
        part = parts_of(run_first, low, high)
        starts = first[part] + np.arange(low, high) - run_first[part]
        lengths = np.minimum(counts[part], n)
        shortest = int(lengths.min())
        with np.errstate(over="ignore"):
            total = np.zeros(len(starts), np.uint64)
            for offset in range(n):
                # Horner's rule.
                step = total * np.uint64(_JOIN) + hashes[np.minimum(starts + offset, len(hashes) - 1)]
                total = step if offset < shortest else np.where(offset < lengths, step, total)
            found[low:high] = mix(total ^ lengths.astype(np.uint64))
    return found, run_first


def mix(x: np.ndarray) -> np.ndarray:
    """One step of splitmix64 on each uint64. Source: Steele, Lea and Flood, OOPSLA 2014, figure 16."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _powers(base: int, n: int) -> np.ndarray:
    """base^0 to base^(n - 1) modulo 2^64, uint64; n: at most one more than a stretch."""
    return _all_powers(base, STRETCH + 1)[:n]


@lru_cache(maxsize=2)
def _all_powers(base: int, n: int) -> np.ndarray:
    factors = np.full(n, base, np.uint64)
    factors[0] = 1
    with np.errstate(over="ignore"):
        return np.cumprod(factors)
