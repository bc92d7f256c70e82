"""Signals of a text's lines and paragraphs: how many repeat, are short, are bullets, or end as sentences do.

Lines are what newlines part, paragraphs what blank lines part; white space around them is none of theirs, and blank
ones are none. A share of nothing is 0.
"""

from collections.abc import Callable, Iterator

from moray.data.curation.words import STRETCH

TERMINALS = (".", "?", "!", '"', "'", "”", "’", "»", "。", "！", "？", "…", "；", "」", "』", "।", "؟", "۔")
"""What ends a line of prose. C4's . ? ! and quotes, with the same of Chinese, Japanese, Hindi, Arabic and Urdu."""

_BULLETS = ("•", "‣", "◦", "●", "○", "■", "▪", "▫", "▶", "·", "–", "-", "*")  # "□" is a lost character in Chinese
_ELLIPSES = ("...", "…")
_SHORT = 30


def lines_by_stretch(text: str) -> Iterator[list[str]]:
    """What newlines part, blank or not, some at a time: those of at least STRETCH characters."""
    low = 0
    while (end := text.find("\n", low + STRETCH)) >= 0:
        yield text[low:end].split("\n")
        low = end + 1
    yield text[low:].split("\n")


def lines_of(text: str) -> list[str]:
    return [line for raw in text.split("\n") if (line := raw.strip())]


def paragraphs_of(text: str) -> list[str]:
    return [paragraph for raw in text.split("\n\n") if (paragraph := raw.strip())]


def duplicates(parts: list[str]) -> float:
    """Share of the parts that stood in the text before."""
    return (len(parts) - len(set(parts))) / max(len(parts), 1)


def duplicate_chars(parts: list[str], size: int) -> float:
    """Share of a text of `size` characters that are in parts which stood in it before."""
    return (sum(map(len, parts)) - sum(map(len, set(parts)))) / max(size, 1)


def _share(lines: list[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, lines)) / max(len(lines), 1)


LINE_SIGNALS: dict[str, Callable[[list[str]], float]] = {
    "bullet_lines": lambda lines: _share(lines, lambda line: line.startswith(_BULLETS)),
    "ellipsis_lines": lambda lines: _share(lines, lambda line: line.endswith(_ELLIPSES)),
    "terminal_lines": lambda lines: _share(lines, lambda line: line.endswith(TERMINALS)),
    "short_lines": lambda lines: _share(lines, lambda line: len(line) <= _SHORT),
    "duplicate_lines": duplicates,
}
"""What is a function of the lines alone."""
