"""Paragraphs that stand in many texts, such as footers and notices: their hashes, and a text without them."""

# Shapes: D texts, P paragraphs of all of them that may be removed.

import re
from collections.abc import Sequence

import numpy as np

from moray.data.curation.words import Words, folded, pieces
from moray.data.curation.words import spans as hashes_of_spans

FEWEST_WORDS = 13
"""A shorter paragraph is never removed: "Chapter 2" and "he said" come again by chance. Source: Li et al.,
"DataComp-LM", 2024, whose filter leaves paragraphs below 13 words (min_ngram_size) as they are."""

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_LINE_END = re.compile(r"\n")
_UP_TO_NEXT = re.compile(r"(?:[^\S\n]*\n)*")


def paragraphs(text: str) -> list[tuple[int, int]]:
    """Start and end, in code points, of what blank lines separate; in a text that has none, of the lines.

    They hold all that is visible; none is empty.
    """
    start, end = text.rfind("\n", 0, len(text) - len(text.lstrip())) + 1, len(text.rstrip())
    if start >= end:
        return []
    separator = _BLANK_LINES if _BLANK_LINES.search(text, start, end) else _LINE_END
    edges = [start, *(edge for found in separator.finditer(text, start, end) for edge in found.span()), end]
    return list(zip(edges[::2], edges[1::2], strict=True))


def hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the paragraphs that have 13 words at least: hashes, uint64 [P], where each text's begin, int64 [D + 1], and
    their starts and ends in the text, int64 [P, 2].

    Equal hashes: the same words, folded, in the same order, whatever stands between them.
    """
    found = [paragraphs(text) for text in texts]
    words = Words.of(
        [folded(text[start:end]) for text, spans in zip(texts, found, strict=True) for start, end in spans]
    )
    is_long = words.counts >= FEWEST_WORDS
    spans_P2 = np.array([span for spans in found for span in spans], np.int64).reshape(-1, 2)
    n_before = np.concatenate([[0], np.cumsum(is_long)])
    first = n_before[np.cumsum([0, *map(len, found)])]
    of_words = hashes_of_spans(pieces(words.hashes), words.first[:-1], words.first[1:])
    return of_words[is_long], first, spans_P2[is_long]


def without(text: str, spans: np.ndarray, repeated: np.ndarray) -> str:
    """The text without those of its spans, int64 [P, 2], that are repeated, bool [P], and what separated each from the
    next; spans as `hashes` gives them. "" if nothing visible is left.
    """
    kept, at = [], 0
    for start, end in spans[repeated].tolist():
        kept.append(text[at:start])
        separator = _UP_TO_NEXT.match(text, end)
        assert separator  # it may be empty
        at = separator.end()
    rest = text[at:]
    return "".join(kept) + rest if rest.strip() else "".join(kept).rstrip()
