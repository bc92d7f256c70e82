"""Text that gives evaluations away: runs of words that a document shares with what models are judged by.

Source: Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C: runs of 13 words, or of all words of an
evaluation text that has 8 to 12; below that, chance is as good an explanation.
"""

# Shapes: D documents, E runs of words of the evaluation texts, W runs of those of the documents.

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moray.data.curation.words import Words, folded

MOST_WORDS, FEWEST_WORDS = 13, 8
_TEXTS = 1000  # read at a time


@dataclass(frozen=True, eq=False)
class Benchmarks:
    """The runs of words of evaluation texts.

    hashes: uint64 [E], sorted. lengths: how many words their runs have. n_texts: that have runs. n_short: that have
    fewer than 8 words, and cannot be found. Memory: 9 to 17 bytes a run.
    """

    hashes: np.ndarray
    lengths: tuple[int, ...]
    n_texts: int
    n_short: int

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Benchmarks":
        hashes, lengths = np.zeros(0, np.uint64), set[int]()
        n_short = 0
        for low in range(0, len(texts), _TEXTS):
            words = Words.of([folded(text) for text in texts[low : low + _TEXTS]])
            runs, first = words.ngrams(MOST_WORDS)
            is_long = words.counts >= FEWEST_WORDS
            hashes = np.union1d(hashes, runs[np.repeat(is_long, np.diff(first))])
            lengths |= {*np.minimum(words.counts[is_long], MOST_WORDS).tolist()}
            n_short += int((~is_long).sum())
        return cls(hashes, tuple(sorted(lengths)), len(texts) - n_short, n_short)

    def found(self, words: Words) -> np.ndarray:
        """How many runs of each document are some evaluation text's, int64 [D]. `words` are those of folded texts."""
        found = np.zeros(len(words.counts), np.int64)
        for length in self.lengths:
            is_known, first = self._known(words, length)
            found += np.diff(np.concatenate([[0], np.cumsum(is_known)])[first])
        return found

    def example(self, text: str) -> str:
        """The first run of words, folded, that the text shares with an evaluation text; "" if there is none."""
        words = Words.of([folded(text)])
        for length in self.lengths:
            is_known, _ = self._known(words, length)
            if is_known.any():
                start = int(is_known.argmax())
                codes = words.codes[words.starts[start] : words.ends[start + length - 1]]
                return codes.tobytes().decode("utf-32-le", "surrogatepass")
        return ""

    def _known(self, words: Words, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Whether each run of this length is known, bool [W], and where each document's begin, int64 [D + 1].

        A shorter document has one run, of all its words, which is none of this length.
        """
        hashes, first = words.ngrams(length)
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return (self.hashes[places] == hashes) & np.repeat(words.counts >= length, np.diff(first)), first
