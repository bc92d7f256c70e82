"""How much of a text is repeated runs of words.

A run of n words is an n-gram; its characters are all from its first word's first to its last word's last, what
stands between words as well. Each character counts once, and shares are of all of the text's characters.
- top_n_gram: characters in the n-gram that occurs most often (of several, the one that comes first); 0 where none
  occurs twice.
- duplicate_n_gram_chars: characters in n-grams that stood in the text before; the first place isn't counted.
Source: Rae et al. 2021 (Gopher), A1.1: "the fraction of characters contained within". That the first place isn't
counted is datatrove's and RedPajama's reading of it.
"""

# Shapes: D texts, N n-grams that occur more than once in their text.

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from moray.data.curation.words import BASE, Words, mix, parts_of, stretches

TOP = {f"top_{n}_gram": n for n in (2, 3, 4)}
DUPLICATE = {f"duplicate_{n}_gram_chars": n for n in range(5, 11)}


@dataclass(frozen=True, eq=False)
class _Repeated:
    """N-grams that occur more than once in their text, in the order of their places.

    at: int32 [N], the first word of each. number: int32 [N], which of the different ones it is, below `n_numbers`.
    is_first: bool [N], whether it is the first one. Memory: 9 bytes each.
    """

    at: np.ndarray
    number: np.ndarray
    n_numbers: int
    is_first: np.ndarray

    @classmethod
    def of(cls, n: int, at_and_keys: Callable[[int, int], tuple[np.ndarray, np.ndarray]]) -> "_Repeated":
        """From n n-grams in the order of their places: the first words of those from `low` to `high`, and keys that are
        equal for equal ones of one text. Memory: a key each and, of those that are repeated, what is kept.
        """
        keys = np.empty(n, np.uint64)
        for low, high in stretches(n):
            keys[low:high] = at_and_keys(low, high)[1]
        keys.sort()
        again = keys[1:] == keys[:-1]
        is_second = again.copy()
        is_second[1:] &= ~again[:-1]
        different = keys[1:][is_second]
        n_repeated = int(again.sum()) + len(different)
        del keys, again, is_second
        at, number, is_first = (
            np.empty(n_repeated, np.int32),
            np.empty(n_repeated, np.int32),
            np.empty(n_repeated, bool),
        )
        is_new, done = np.ones(len(different), bool), 0
        for low, high in stretches(n if n_repeated else 0):
            words, keys = at_and_keys(low, high)
            place = np.minimum(np.searchsorted(different, keys), len(different) - 1)
            here = different[place] == keys
            place = place[here]
            each, first = np.unique(place, return_index=True)
            mine = slice(done, done + len(place))
            at[mine], number[mine], is_first[mine] = words[here], place, False
            is_first[mine][first[is_new[each]]] = True
            is_new[each] = False
            done += len(place)
        return cls(at, number, len(different), is_first)

    def longer(self) -> "_Repeated":
        """The same of n + 1 words: both n-grams within a repeated one are repeated, and their numbers name it.

        Two neighbours of different texts are a pair that occurs once, as numbers belong to one text each.
        """
        left = np.flatnonzero(np.diff(self.at) == 1).astype(np.int32)

        def at_and_keys(low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
            pairs = left[low:high]
            one, other = self.number[pairs].astype(np.uint64), self.number[pairs + 1].astype(np.uint64)
            return self.at[pairs], one * np.uint64(self.n_numbers) + other

        return _Repeated.of(len(left), at_and_keys)


def repetition(words: Words, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """Those of the names in TOP and DUPLICATE that are wanted, float64 [D] each."""
    sizes = np.maximum(np.diff(words.text_first), 1)
    longest = max((n for name, n in (TOP | DUPLICATE).items() if name in wanted), default=0)
    found = {}
    for n, grams in enumerate(_by_length(words, longest), 1):
        top, duplicate = f"top_{n}_gram", f"duplicate_{n}_gram_chars"
        if top in wanted:
            found[top] = _covered(words, grams.at[_is_top(grams, words.first)], n) / sizes
        if duplicate in wanted:
            found[duplicate] = _covered(words, grams.at[~grams.is_first], n) / sizes
    return found


def _by_length(words: Words, longest: int) -> Iterator[_Repeated]:
    """Of one word to `longest` words; each is found among the last, so that most texts cost one sort."""

    def at_and_keys(low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        of_text = parts_of(words.first, low, high).astype(np.uint64) * np.uint64(BASE)
        return np.arange(low, high), mix(words.hashes[low:high] ^ of_text)

    if longest:
        grams = _Repeated.of(len(words), at_and_keys)
        yield grams
        for _ in range(1, longest):
            grams = grams.longer()
            yield grams


def _is_top(grams: _Repeated, first: np.ndarray) -> np.ndarray:
    """Which are the n-gram that occurs most often in their text, bool [N]. first: the first word of each text."""
    # Of each different one, in the order in which they come.
    at, number = grams.at[grams.is_first], grams.number[grams.is_first]
    if not len(at):
        return np.zeros(0, bool)
    text = np.searchsorted(first, at, "right") - 1
    begins = np.flatnonzero(np.diff(text, prepend=-1))
    count = np.bincount(grams.number)[number]
    most = np.repeat(np.maximum.reduceat(count, begins), np.diff(begins, append=len(at)))
    best = np.flatnonzero(count == most)
    is_top = np.zeros(grams.n_numbers, bool)
    is_top[number[best[np.diff(text[best], prepend=-1) != 0]]] = True
    return is_top[grams.number]


def _covered(words: Words, at: np.ndarray, n: int) -> np.ndarray:
    """Characters of each text that are in the n-grams which begin at the words `at` (in order), int64 [D]."""
    found, covered = np.zeros(len(words.counts), np.int64), 0
    for low, high in stretches(len(at)):
        here = at[low:high]
        starts, ends = words.starts[here], words.ends[here + n - 1]
        new = ends - np.maximum(starts, np.concatenate([[covered], ends[:-1]]))
        sums = np.concatenate([[0], np.cumsum(new)])
        found += np.diff(sums[np.searchsorted(here, words.first)])
        covered = int(ends[-1])
    return found
