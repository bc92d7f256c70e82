"""Text that gives evaluations away: runs of words that a document shares with what models are judged by.

Source: Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C: runs of 13 words, or of all words of an
evaluation text that has 8 to 12; below that, chance is as good an explanation.
"""

# Shapes: D documents, E runs of words of the evaluation texts, W runs of those of the documents.

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moray.data.curation.words import Words, folded, folded_words, pieces, spans

MOST_WORDS, FEWEST_WORDS = 13, 8


@dataclass(frozen=True, eq=False)
class Benchmarks:
    """The runs of words of evaluation texts.

    hashes: uint64 [E], sorted. lengths: how many words their runs have. n_texts: that have runs. n_short: that have
    fewer than 8 words, and cannot be found. Memory: 16 to 24 bytes a run.
    """

    hashes: np.ndarray
    lengths: tuple[int, ...]
    n_texts: int
    n_short: int

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Benchmarks":
        parts, lengths, n_texts, n_short = [np.zeros(0, np.uint64)], set[int](), 0, 0
        for words in folded_words(texts):
            own = np.minimum(words.counts, MOST_WORDS)
            for length in range(FEWEST_WORDS, MOST_WORDS + 1):
                starts = _starts(words, np.where(own == length, words.counts - length + 1, 0))
                parts.append(spans(pieces(words.hashes), starts, starts + length))
            lengths |= {*own[own >= FEWEST_WORDS].tolist()}
            n_texts += int((own >= FEWEST_WORDS).sum())
            n_short += int((own < FEWEST_WORDS).sum())
        return cls(np.unique(np.concatenate(parts)), tuple(sorted(lengths)), n_texts, n_short)

    def found(self, words: Words) -> np.ndarray:
        """How many runs of each document are some evaluation text's, int64 [D]. `words` are those of folded texts."""
        found = np.zeros(len(words.counts), np.int64)
        for length in self.lengths:
            found += np.diff(np.searchsorted(self._known(words, length), words.first))
        return found

    def example(self, text: str) -> str:
        """A run of words, folded, that the text shares with an evaluation text; "" if there is none."""
        words = Words.of([folded(text)])
        for length in self.lengths:
            for start in self._known(words, length)[:1].tolist():
                return words.text[words.starts[start] : words.ends[start + length - 1]]
        return ""

    def _known(self, words: Words, length: int) -> np.ndarray:
        """The words, int64 and ascending, at which a run of this length begins that is known."""
        starts = _starts(words, np.maximum(words.counts - length + 1, 0))
        hashes = spans(pieces(words.hashes), starts, starts + length)
        # Most are not, and most of those are told by their first bits; a search for each takes ten times as long.
        maybe = np.flatnonzero(self._prefixes[hashes >> self._shift])
        places = np.minimum(np.searchsorted(self.hashes, hashes[maybe]), len(self.hashes) - 1)
        return starts[maybe[self.hashes[places] == hashes[maybe]]]

    @cached_property
    def _prefixes(self) -> np.ndarray:
        """Of each value of the first bits of a hash, whether one of them begins with it: bool, 8 to 16 for each."""
        prefixes = np.zeros(1 << (64 - int(self._shift)), bool)
        prefixes[self.hashes >> self._shift] = True
        return prefixes

    @property
    def _shift(self) -> np.uint64:
        return np.uint64(61 - len(self.hashes).bit_length())


def _starts(words: Words, n_runs: np.ndarray) -> np.ndarray:
    """The first n_runs, int64 [D], words of each text: int64, ascending."""
    before = np.cumsum(n_runs) - n_runs
    return np.arange(int(n_runs.sum())) + np.repeat(words.first[:-1] - before, n_runs)
