"""Text of data as a terminal may show it, and what the key of a document says."""

import re
import unicodedata

_OF_LINES = re.compile(r"(.+\.(?:jsonl|ndjson)(?:\.(?:gz|bz2|xz|zst))?):(\d+)((?:[#/]\d+)*)", re.IGNORECASE)


def visible(text: str) -> str:
    """Control and format characters, and those that no font has, as escapes: none acts on a terminal, none hides."""
    return "".join(
        one if one in "\n\t" or unicodedata.category(one)[0] != "C" else one.encode("unicode_escape").decode()
        for one in text
    )


def line_of(key: str) -> tuple[str, int] | None:
    """File and line of a document that a line of JSON was, where the key has its number; None: it has none.

    A record that has an `id` is named by that, and an `id` may be a number like the line's.
    """
    found = _OF_LINES.fullmatch(key)
    return (found[1], int(found[2])) if found else None


def named(key: str) -> str:
    """A key, with the line in words."""
    line = line_of(key)
    return visible(f"{key} ({line[0]}, line {line[1]} or id {line[1]})" if line else key).replace("\n", "\\n")
