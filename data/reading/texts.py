"""Plain text: whole files, and texts of any length in pieces of a bounded one."""

import io
from collections.abc import Iterable, Iterator
from functools import partial

from moray.data.reading.compression import BUFFER_BYTES
from moray.data.reading.records import Item, Record
from moray.data.reading.rules import Rules


def read_text(file: io.BufferedReader, rules: Rules) -> Iterator[Item]:
    """The file as one document, named by nothing (its key is the file's)."""
    yield Record("", "", iter(partial(file.read, BUFFER_BYTES), b""))


def cut(blocks: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """A text in pieces of at most `limit` bytes, one at least, which joined are the text with its CRLFs made LFs.

    A piece ends after a paragraph, a line or a word, whichever is found first in its second half, or else anywhere
    between two characters. Memory: two pieces.
    """
    rest = bytearray()
    for block in blocks:
        if rest.endswith(b"\r") and block.startswith(b"\n"):
            del rest[-1]
        rest += block.replace(b"\r\n", b"\n")
        while len(rest) > limit:
            end = _end(rest, limit)
            yield bytes(rest[:end])
            del rest[:end]
    yield bytes(rest)


def _end(text: bytearray, limit: int) -> int:
    for mark in (b"\n\n", b"\n", b" "):
        if (found := text.rfind(mark, limit // 2, limit)) >= 0:
            return found + len(mark)
    for end in range(limit, limit - 4, -1):
        if text[end] & 0xC0 != 0x80:  # where a character begins in UTF-8
            return end
    return limit
