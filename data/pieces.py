"""Where a long text may be cut, so that the tokens of its pieces, one after another, are the tokens of the whole.

A tokenizer is run over a piece at a time, for it takes about 260 bytes a token while it works. Cuts lie only where its
pre-tokenizer is known to split whatever comes before and after, and where none is known, a text is one piece.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import tokenizers

PIECE_CHARS = 1 << 16
TRIES = 100  # candidates asked about before the rest of a text is taken whole
CONTEXT = 100  # characters on each side of a cut that the pre-tokenizer is asked about

# Before a single space between words: it begins the next word (GPT-2, Llama 3, Metaspace) or stands alone.
WORDS = r"(?<=[^\W\d_])(?= [^\W\d_])"
# Behind a single line end before a word: none of the regular expressions in use joins a line end to letters.
LINES = r"(?<=\S\n)(?=[^\W\d_])"
# Before a comma or a stop between Chinese characters: it ends what is before, and may begin what comes after.
HAN = r"(?<=[\u4e00-\u9fff])(?=[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f][\u4e00-\u9fff])"

_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace"}
_PRE_TOKENIZERS = {"ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "Metaspace"}


class Cutter:
    """Cuts texts for one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        stated = json.loads(backend.to_str())
        self._pattern = re.compile(pattern_of(stated) or "(?!)")
        self._normalizer = backend.normalizer
        self._pre_tokenizer = None if _is_undivided(stated) else backend.pre_tokenizer
        # Whoever puts a space before every text would put one more before a piece that begins with one.
        self._drops_space = any(part["type"] == "Prepend" for part in _parts(stated["normalizer"]))

    def pieces(self, text: str) -> Iterator[str]:
        """The pieces, of about PIECE_CHARS characters where that can be."""
        start = 0
        while start + PIECE_CHARS < len(text) and (end := self._next_cut(text, start + PIECE_CHARS)):
            yield text[start + self._space(start) : end]
            start = end
        yield text[start + self._space(start) :]

    def _space(self, start: int) -> int:
        return int(self._drops_space and start > 0)

    def _next_cut(self, text: str, after: int) -> int | None:
        for _, found in zip(range(TRIES), self._pattern.finditer(text, after), strict=False):
            cut = found.start()
            before, behind = text[cut - CONTEXT : cut], text[cut : cut + CONTEXT]
            if self._split(before + behind) == self._split(before) + self._split(behind):
                return cut
        return None

    def _split(self, text: str) -> list[str]:
        """What the pre-tokenizer makes of a text; nothing where it is the vocabulary that splits."""
        if self._pre_tokenizer is None:
            return []
        normal = self._normalizer.normalize_str(text) if self._normalizer else text
        return [word for word, _ in self._pre_tokenizer.pre_tokenize_str(normal)]


def pattern_of(stated: dict[str, Any]) -> str | None:
    """A regular expression that matches the empty string where a tokenizer (its tokenizer.json) may be cut.

    None where no such place is known: a normalizer or a pre-tokenizer of another kind, an added token that takes the
    space beside it, or a vocabulary whose tokens reach over spaces.
    """
    if not all(part["type"] in _NORMALIZERS and _is_sign(part) for part in _parts(stated["normalizer"])):
        return None
    if any(_reaches_out(token) for token in stated["added_tokens"] if not token["special"]):
        return None
    steps = _parts(stated["pre_tokenizer"])
    # A regular expression that looks behind itself would see another past in a piece.
    if any(part["type"] not in _PRE_TOKENIZERS or "(?<" in str(part.get("pattern")) for part in steps):
        return None
    if _is_undivided(stated):
        return WORDS if _begin_words(stated["model"]) else None
    if any(part["type"] == "Metaspace" or part.get("add_prefix_space") for part in steps):
        return WORDS
    return f"{WORDS}|{LINES}|{HAN}"


def _parts(stated: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, those within sequences too."""
    if stated is None:
        return []
    inner = stated.get("normalizers") or stated.get("pretokenizers") or []
    return [part for each in inner for part in _parts(each)] if stated["type"] == "Sequence" else [stated]


def _is_sign(normalizer: dict[str, Any]) -> bool:
    """Whether a replacement is the one of SentencePiece: a space by its visible sign."""
    return normalizer["type"] != "Replace" or normalizer["pattern"] == {"String": " "}


def _is_undivided(stated: dict[str, Any]) -> bool:
    """Whether a text is one word to the model, as SentencePiece has it (Gemma splits at spaces that are no more)."""
    steps = _parts(stated["pre_tokenizer"])
    has_sign = any(part["type"] == "Replace" for part in _parts(stated["normalizer"]))
    return all(
        (part["type"] == "Metaspace" and not part["split"]) or (has_sign and part.get("pattern") == {"String": " "})
        for part in steps
    )


def _reaches_out(token: dict[str, Any]) -> bool:
    """Whether an added token that texts may hold is found across a cut, or takes what is beside it."""
    return token["lstrip"] or token["rstrip"] or token["single_word"] or bool(re.search(r"\s\w", token["content"]))


def _begin_words(model: dict[str, Any]) -> bool:
    """Whether no token holds the sign of a space behind anything else, so that none reaches into the next word."""
    vocab = model["vocab"] if isinstance(model["vocab"], dict) else [piece for piece, _ in model["vocab"]]
    return "▁" in vocab and not any(re.search("[^▁]▁", token) for token in vocab)
