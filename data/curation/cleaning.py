"""Cleans a text: its characters, broken encodings, the lines of a web page that are no prose, and personal marks."""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal

from moray import UserError
from moray.data.curation.lines import TERMINALS, lines_by_stretch
from moray.data.curation.masking import masked
from moray.data.curation.words import Words


@dataclass(frozen=True)
class Cleaning:
    """What is cleaned. Steps run in the order mojibake, characters, lines, mask."""

    characters: bool = True
    """One form for what looks the same: newlines, NFC, no control or zero-width characters, no white space at ends."""
    mojibake: bool = False
    """Undo wrong decodings ("schÃ¶n") by ftfy; 3 MB a second."""
    lines: bool = False
    """C4's rules: only lines of three words or more that end as sentences do, and no cookie or JavaScript notices."""
    mask: tuple[Literal["email", "ip", "card"], ...] = ()
    """Put placeholders for these."""


def clean(text: str, how: Cleaning) -> tuple[str, dict[str, int]]:
    """The text cleaned, and for each step taken the UTF-8 bytes by which it became shorter.

    A step that made it longer has a negative number, so the bytes of the text less all of these are those of the
    cleaned one. Cleaning what is clean changes nothing, ftfy aside, which promises no such thing.
    Raises UserError where `how.mojibake` is set and ftfy isn't installed.
    """
    steps = {
        "mojibake": (how.mojibake, _decoded_rightly),
        "characters": (how.characters, clean_characters),
        "lines": (how.lines, prose_lines),
        "mask": (bool(how.mask), lambda text: masked(text, how.mask)),
    }
    removed = {}
    for name, (asked, step) in steps.items():
        if asked:
            before, text = text, step(text)
            removed[name] = 0 if text == before else _n_bytes(before) - _n_bytes(text)
    return text, removed


# Control characters but tabs and what ends lines; soft hyphens, zero-width spaces, word joiners and the invisible
# operators behind them, byte order marks; halves of surrogate pairs, which no file of UTF-8 can hold.
_INVISIBLE = "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u2060-\u2064\ufeff\ud800-\udfff"
_LINE_ENDS = "\r\x0b\x0c\x85\u2028\u2029"
_JOINERS = "\u200c\u200d"
_NOTHING = re.compile(f"[{_INVISIBLE}]+")
_NEWLINE = re.compile(f"\r\n|[{_LINE_ENDS}]")
_JOINING = re.compile(f"[{_JOINERS}]+")
_BLANK_LINES = re.compile(r"\n{4,}")

MAX_MARKS = 30
"""Marks in a row that stay: no script needs more. Source: UAX #15, section 13 (Stream-Safe Text Format)."""


def clean_characters(text: str) -> str:
    """Rules of `Cleaning.characters`; linear in the text's length, whatever is in it."""
    if _marks().rare.search(text):
        # What is removed goes first: "\r\0\n" is one newline.
        text = _NEWLINE.sub("\n", _NOTHING.sub("", text))
        before = None
        # Joiners between letters and marks change how these compose, and are judged by what they composed to.
        while text != before:
            before = text
            # Normalising takes a time quadratic in the length of a run of marks (minutes for 300 kB of them). Some
            # letters come apart into a letter and a mark, so a run may be too long only afterwards.
            text = _without_long_runs(unicodedata.normalize("NFC", _without_long_runs(text)))
            text = _JOINING.sub(_joiner, text)
    text = unicodedata.normalize("NFC", text)
    parts = ["\n".join([line.rstrip() for line in lines]) for lines in lines_by_stretch(text)]
    return _outlined("\n".join(parts))


def _joiner(run: re.Match[str]) -> str:
    """Joiners shape Indic, Arabic and Persian words and hold emoji together; elsewhere they are nothing."""
    text, start, end = run.string, run.start(), run.end()
    if start == 0:
        return ""
    # Behind a virama one stands even at the end of a word.
    after_virama = unicodedata.combining(text[start - 1]) == 9
    return run[0][0] if after_virama or (_joinable(text[start - 1]) and _joinable(text[end : end + 1])) else ""


def _joinable(char: str) -> bool:
    """Whether this is a letter, a mark or an emoji."""
    return char != "" and (unicodedata.category(char)[0] in "LM" or unicodedata.category(char) in ("So", "Sk"))


def _without_long_runs(text: str) -> str:
    marks = _marks()
    return marks.long_run.sub(r"\1", text) if marks.perhaps_long_run.search(text) else text


@dataclass(frozen=True)
class _Marks:
    """Patterns of marks. A class of characters above U+FFFF is 20 times slower to look for than one below.

    So `rare` (what most texts have nothing of) and `perhaps_long_run` take all those for marks.
    """

    rare: re.Pattern[str]
    perhaps_long_run: re.Pattern[str]
    long_run: re.Pattern[str]


@lru_cache(maxsize=1)
def _marks() -> _Marks:
    marks = "".join(char for char in map(chr, range(0x110000)) if unicodedata.combining(char))
    perhaps = "".join(char for char in marks if char <= "\uffff") + "\U00010000-\U0010ffff"
    # A class in front, not a group or a repeat, is what lets `re` skip quickly to where one begins.
    return _Marks(
        rare=re.compile(f"[{_INVISIBLE}{_LINE_ENDS}{_JOINERS}{perhaps}]"),
        perhaps_long_run=re.compile(f"[{perhaps}][{perhaps}]{{{MAX_MARKS}}}"),
        long_run=re.compile(f"([{marks}][{marks}]{{{MAX_MARKS - 1}}})[{marks}]+"),
    )


def _outlined(text: str) -> str:
    """At most two blank lines in a row, none first or last."""
    return _BLANK_LINES.sub("\n\n\n", text).strip()


# C4's own list. Source: `_POLICY_SUBSTRINGS` in TFDS's text/c4_utils.py, the code that made C4.
_NOTICES = (
    "javascript",
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_MIN_WORDS = 3


def prose_lines(text: str) -> str:
    """The lines that end in terminal punctuation or a quotation mark, of three words or more, that are no notices.

    Blank lines stay, where C4 loses them: they are what parts paragraphs. Characters of Chinese and Japanese are
    words, and their marks end lines, a double ellipsis as well; other ellipses do not: such lines are cut off.
    Source: Raffel et al., JMLR 2020, section 2.2.
    """
    parts = []
    for lines in lines_by_stretch(text):
        n_words = Words.of(lines).counts.tolist()
        kept = [
            line
            for line, n in zip(lines, n_words, strict=True)
            if not line.strip() or (n >= _MIN_WORDS and _is_prose(line))
        ]
        parts += ["\n".join(kept)] if kept else []
    return _outlined("\n".join(parts))


def _is_prose(line: str) -> bool:
    line = line.strip()
    is_cut_off = line.endswith(("...", "…")) and not line.endswith("……")
    return line.endswith(TERMINALS) and not is_cut_off and not any(notice in line.lower() for notice in _NOTICES)


def _decoded_rightly(text: str) -> str:
    ftfy = _ftfy()
    # Of all that ftfy can do the encoding alone: the rest changes what was meant so ("…" to "...", ligatures, quotes).
    only_encoding = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
    )
    return str(ftfy.fix_text(text, only_encoding))


def _ftfy() -> Any:
    try:
        return import_module("ftfy")
    except ImportError:
        raise UserError("cleaning with mojibake=true needs ftfy: pip install 'moray-train[clean]'") from None


def _n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
