"""Numbers that tell prose from what is none, of a batch of texts at once. Rules (`rules.py`) are bounds on them."""

# Shapes: D texts.

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from moray.data.curation import repetition
from moray.data.curation.lines import LINE_SIGNALS, duplicate_chars, duplicates, lines_of, paragraphs_of
from moray.data.curation.scripts import NO_LETTER, SCRIPTS, SPACE, scripts_of, shares
from moray.data.curation.sentences import n_sentences_each
from moray.data.curation.words import Words, codes_of, parts_of, stretches

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
"""Source: Rae et al. 2021 (Gopher), A1.1."""


def _n_words(words: Words) -> np.ndarray:
    return words.counts.astype(np.float64)


def _mean_word_length(words: Words) -> np.ndarray:
    total = np.zeros(len(words.counts), np.int64)
    for low, high in stretches(len(words)):
        text, lengths = parts_of(words.first, low, high), words.ends[low:high] - words.starts[low:high]
        total += np.bincount(text, weights=lengths, minlength=len(total)).astype(np.int64)
    return total / np.maximum(words.counts, 1)


def _alphabetic_words(words: Words) -> np.ndarray:
    """Of what white space parts, not of `Words`: those are letters and digits only, and tables are full of neither."""
    n_words, n_alphabetic = np.zeros((2, len(words.text_ends)), np.int64)
    low, before, n_begun, last = 0, SPACE, 0, 0  # last: of those begun, by number, the last one that has a letter
    for codes in codes_of(words.text):
        text, scripts = parts_of(words.text_first, low, low + len(codes)), scripts_of(codes)
        follows = np.concatenate([[before], scripts[:-1]]) == SPACE
        follows[1:] |= text[1:] != text[:-1]
        follows[0] |= low in words.text_ends
        begins = follows & (scripts != SPACE)
        number = n_begun + np.cumsum(begins)
        letters = np.flatnonzero(scripts > NO_LETTER)
        first_letters = letters[np.diff(number[letters], prepend=last) != 0]
        n_words += np.bincount(text[begins], minlength=len(n_words))
        n_alphabetic += np.bincount(text[first_letters], minlength=len(n_words))
        low, before, n_begun = low + len(codes), scripts[-1], int(number[-1])
        last = int(number[letters[-1]]) if len(letters) else last
    return n_alphabetic / np.maximum(n_words, 1)


def _stop_words(words: Words) -> np.ndarray:
    is_there = np.zeros((len(words.counts), len(STOP_WORDS)), bool)
    forms = [Words.of([word, word.capitalize(), word.upper()]).hashes for word in STOP_WORDS]
    for low, high in stretches(len(words)):
        lengths = words.ends[low:high] - words.starts[low:high]
        short = np.flatnonzero(lengths <= max(map(len, STOP_WORDS)))
        text, hashes = parts_of(words.first, low, high)[short], words.hashes[low:high][short]
        for place, of_word in enumerate(forms):
            is_there[text[np.isin(hashes, of_word)], place] = True
    return is_there.sum(1).astype(np.float64)


_OF_WORDS: dict[str, Callable[[Words], np.ndarray]] = {
    "n_words": _n_words,
    "mean_word_length": _mean_word_length,
    "alphabetic_words": _alphabetic_words,
    "stop_words": _stop_words,
}
_OF_TEXT: dict[str, Callable[[str], float]] = {
    "duplicate_line_chars": lambda text: duplicate_chars(lines_of(text), len(text)),
    "duplicate_paragraphs": lambda text: duplicates(paragraphs_of(text)),
    "duplicate_paragraph_chars": lambda text: duplicate_chars(paragraphs_of(text), len(text)),
    "lorem_ipsum": lambda text: text.lower().count("lorem ipsum"),
    "curly_brackets": lambda text: text.count("{"),
}
_PER_WORD: dict[str, Callable[[str], float]] = {
    # A double ellipsis, as Chinese has it, is one.
    "symbol_to_word": lambda text: max(text.count("#"), text.count("...") + text.count("…") - text.count("……")),
    "newlines_per_word": lambda text: text.count("\n"),
}

SIGNALS = (
    *_OF_WORDS,
    *LINE_SIGNALS,
    *_OF_TEXT,
    *_PER_WORD,
    "n_sentences",
    *repetition.TOP,
    *repetition.DUPLICATE,
    *SCRIPTS,
    "unspaced",
)
"""All there are.

n_words, n_sentences, lorem_ipsum, curly_brackets: how many. mean_word_length: in characters. symbol_to_word: '#', or
ellipses if there are more, for each word. newlines_per_word: too. alphabetic_words: share with a letter. stop_words:
how many different ones of Gopher's eight. The rest are shares: of lines (`lines.py`), of characters (`repetition.py`),
of letters (`scripts.py`).
"""


def signals(texts: Sequence[str], wanted: Collection[str] = SIGNALS) -> dict[str, np.ndarray]:
    """The signals wanted, float64 [D] each, and no work for others; words are found once for all.

    Give texts of a megabyte together: the work for a batch hardly depends on how many texts are in it.
    """
    found: dict[str, np.ndarray] = {}
    # First, and without any text's lines but one's: of short lines they are larger than all else.
    if of_lines := {name: of for name, of in LINE_SIGNALS.items() if name in wanted}:
        values = [[of(lines) for of in of_lines.values()] for lines in map(lines_of, texts)]
        found |= dict(zip(of_lines, np.array(values, np.float64).reshape(-1, len(of_lines)).T, strict=True))
    found |= {name: _array(map(of, texts)) for name, of in _OF_TEXT.items() if name in wanted}
    words = Words.of(texts)
    found |= {name: of_words(words) for name, of_words in _OF_WORDS.items() if name in wanted}
    n_words = np.maximum(words.counts, 1)
    found |= {name: _array(map(of, texts)) / n_words for name, of in _PER_WORD.items() if name in wanted}
    if "n_sentences" in wanted:
        found["n_sentences"] = _array(n_sentences_each(texts))
    found |= repetition.repetition(words, wanted)
    if {*SCRIPTS, "unspaced"} & set(wanted):
        found |= shares(words)
    return {name: found[name] for name in wanted}


def _array(values: Iterable[float]) -> np.ndarray:
    return np.array(list(values), np.float64)
