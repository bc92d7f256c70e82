"""How many sentences a text has, by sentencex."""

import re
from collections.abc import Sequence

import numpy as np
import sentencex

from moray.data.curation.scripts import shares
from moray.data.curation.words import Words

_LANGUAGES = {
    "cyrillic": "ru",
    "greek": "el",
    "arabic": "ar",
    "devanagari": "hi",
    "thai": "th",
    "kana": "ja",
    "han": "zh",
}
"""Whose abbreviations are looked for where most letters of a text's beginning are of a script; else English."""

_PIECE = 4_000
# sentencex's time is quadratic in the quotation marks of a paragraph: 300,000 of them take half a minute. So it is
# given pieces that end behind a line or a full stop where there is one.
_PIECES = re.compile(rf"(?s:.{{1,{_PIECE}}}(?:(?<=[\n.?!。！？])|$))|(?s:.{{1,{_PIECE}}})")


def n_sentences(text: str) -> int:
    """Sentences of the text; a blank line ends one, a single newline doesn't.

    One that is cut, as it is longer than 4,000 characters or an abbreviation ends such a piece, counts twice.
    """
    return n_sentences_each([text])[0]


def n_sentences_each(texts: Sequence[str]) -> list[int]:
    """As `n_sentences`; the scripts of many texts are found at once."""
    found = shares(Words.of([text[:1_000] for text in texts]))
    languages = ["en"] * len(texts)
    for script, language in _LANGUAGES.items():
        for place in np.flatnonzero(found[script] > 0.5).tolist():
            languages[place] = language
    return [_count(text, language) for text, language in zip(texts, languages, strict=True)]


def _count(text: str, language: str) -> int:
    pieces = _PIECES.findall(text) if len(text) > _PIECE else [text]
    return sum(not part.isspace() for piece in pieces for part in sentencex.segment(language, piece))
