"""How much of a text is repeated runs of words.

A run of n words is an n-gram; its characters are all from its first word's first to its last word's last, what
stands between words as well. Each character counts once, and shares are of all of the text's characters.
- top_n_gram: characters in the n-gram that occurs most often (of several, the one that comes first); 0 where none
  occurs twice.
- duplicate_n_gram_chars: characters in n-grams that stood in the text before; the first place isn't counted.
Source: Rae et al. 2021 (Gopher), A1.1: "the fraction of characters contained within". That the first place isn't
counted is datatrove's and RedPajama's reading of it.
"""

# Shapes: D texts, W words of all of them, N n-grams that occur more than once in their text, G different ones.

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from moray.data.curation.words import BASE, Words, mix

TOP = {f"top_{n}_gram": n for n in (2, 3, 4)}
DUPLICATE = {f"duplicate_{n}_gram_chars": n for n in range(5, 11)}


@dataclass(frozen=True, eq=False)
class _Repeated:
    """N-grams that occur more than once in their text, in the order of their places.

    at: int64 [N], the first word of each. number: int64 [N], which of the different ones it is, below `n_numbers`.
    count: int64 [N], how often it occurs. is_first: bool [N], whether it is the first one.
    """

    at: np.ndarray
    number: np.ndarray
    n_numbers: int
    count: np.ndarray
    is_first: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, at: np.ndarray) -> "_Repeated":
        """From n-grams' first words and keys that are equal for equal ones of one text."""
        if not len(keys):
            return cls(at, at, 0, at, at.astype(bool))
        order = np.argsort(keys)
        is_new = np.diff(keys[order], prepend=~keys[order[:1]]) != 0
        number = np.empty(len(keys), np.int64)
        number[order] = np.cumsum(is_new) - 1
        first = np.minimum.reduceat(order, np.flatnonzero(is_new))
        count = np.bincount(number)[number]
        keep = count > 1
        is_first = first[number] == np.arange(len(keys))
        return cls(at[keep], number[keep], len(first), count[keep], is_first[keep])

    def longer(self) -> "_Repeated":
        """The same of n + 1 words: both n-grams within a repeated one are repeated, and their numbers name it.

        Two neighbours of different texts are a pair that occurs once, as numbers belong to one text each.
        """
        left = np.flatnonzero(np.diff(self.at) == 1)
        return _Repeated.of(self.number[left] * self.n_numbers + self.number[left + 1], self.at[left])


def repetition(words: Words, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """Those of the names in TOP and DUPLICATE that are wanted, float64 [D] each."""
    text_W = np.repeat(np.arange(len(words.counts)), words.counts)
    sizes = np.maximum(np.diff(words.text_ends, prepend=0), 1)
    longest = max((n for name, n in (TOP | DUPLICATE).items() if name in wanted), default=0)
    found = {}
    for n, grams in enumerate(_by_length(words, text_W, longest), 1):
        top, duplicate = f"top_{n}_gram", f"duplicate_{n}_gram_chars"
        if top in wanted:
            found[top] = _covered(words, text_W, grams.at[_is_top(grams, text_W)], n) / sizes
        if duplicate in wanted:
            found[duplicate] = _covered(words, text_W, grams.at[~grams.is_first], n) / sizes
    return found


def _by_length(words: Words, text_W: np.ndarray, longest: int) -> Iterator[_Repeated]:
    """Of one word to `longest` words; each is found among the last, so that most texts cost one sort."""
    if longest:
        of_text = text_W.astype(np.uint64) * np.uint64(BASE)
        grams = _Repeated.of(mix(words.hashes ^ of_text), np.arange(len(words)))
        yield grams
        for _ in range(1, longest):
            grams = grams.longer()
            yield grams


def _is_top(grams: _Repeated, text_W: np.ndarray) -> np.ndarray:
    """Which are the n-gram that occurs most often in their text, bool [N]."""
    first = np.flatnonzero(grams.is_first)
    text = text_W[grams.at[first]]
    best_first = np.lexsort((grams.at[first], -grams.count[first], text))
    is_best = np.diff(text[best_first], prepend=-1) != 0
    is_top = np.zeros(grams.n_numbers, bool)
    is_top[grams.number[first[best_first[is_best]]]] = True
    return is_top[grams.number]


def _covered(words: Words, text_W: np.ndarray, at: np.ndarray, n: int) -> np.ndarray:
    """Characters of each text that are in the n-grams which begin at the words `at` (in order), int64 [D]."""
    starts, ends = words.starts[at], words.ends[at + n - 1]
    new = ends - np.maximum(starts, np.concatenate([[0], ends[:-1]])[: len(ends)])
    return np.bincount(text_W[at], weights=new, minlength=len(words.counts))
