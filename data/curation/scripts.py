"""Which scripts the letters of texts are in: what tells which rules can judge a text at all."""

# Shapes: D texts, C code points of all of them, S scripts.

from functools import lru_cache

import numpy as np

from moray.data.curation.words import ALONE, LETTER, Words, codes_of, kinds_of, parts_of

SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "latin": ((0x41, 0x24F), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF), (0xFB00, 0xFB06), (0xFF21, 0xFF5A)),
    "greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "cyrillic": ((0x400, 0x52F), (0x1C80, 0x1C8F), (0xA640, 0xA69F)),
    "hebrew": ((0x590, 0x5FF), (0xFB1D, 0xFB4F)),
    "arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC)),
    "devanagari": ((0x900, 0x97F), (0xA8E0, 0xA8FF)),
    "thai": ((0xE00, 0xE7F),),
    "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7A3)),
    "kana": ((0x3041, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),
    "han": ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
}
"""Blocks of Unicode; only the letters in them count."""

SPACE, NO_LETTER, OTHER, FIRST_SCRIPT = 0, 1, 2, 3


def scripts_of(codes: np.ndarray) -> np.ndarray:
    """SPACE, NO_LETTER, OTHER (a letter of no script named here) or FIRST_SCRIPT + a place in SCRIPTS; uint8 [C]."""
    return _table()[codes]


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    codes = np.arange(0x110000)
    table = np.where(np.isin(kinds_of(codes), (LETTER, ALONE)), OTHER, NO_LETTER).astype(np.uint8)
    table[[code for code in range(0x3001) if chr(code).isspace()]] = SPACE
    for place, blocks in enumerate(SCRIPTS.values()):
        for low, high in blocks:
            part = table[low : high + 1]
            part[part == OTHER] = FIRST_SCRIPT + place
    return table


def shares(words: Words) -> dict[str, np.ndarray]:
    """Of each script, and of `unspaced` ones together: the share of each text's letters, float64 [D].

    A text without letters has only zeros. Unspaced are the scripts each letter of which is a word (see `Words`).
    """
    n_texts, n_kinds = len(words.text_ends), FIRST_SCRIPT + len(SCRIPTS)
    counts, unspaced, low = np.zeros(n_texts * n_kinds, np.int64), np.zeros(n_texts, np.int64), 0
    for codes in codes_of(words.text):
        text = parts_of(words.text_first, low, low + len(codes))
        counts += np.bincount(text * n_kinds + scripts_of(codes), minlength=n_texts * n_kinds)
        unspaced += np.bincount(text[kinds_of(codes) == ALONE], minlength=n_texts)
        low += len(codes)
    of_texts = counts.reshape(n_texts, n_kinds)
    letters = np.maximum(of_texts[:, OTHER:].sum(1), 1)
    found = {script: of_texts[:, FIRST_SCRIPT + place] / letters for place, script in enumerate(SCRIPTS)}
    return found | {"unspaced": unspaced / letters}
