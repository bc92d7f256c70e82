"""Files in pieces that can be read each by itself: cut by what is in a file, never by who reads it.

A piece is a file, or lines of an uncompressed .jsonl, or row groups of a parquet. Neither its documents nor their names
depend on how a file was cut.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

from moray.data.reading.compression import BUFFER_BYTES
from moray.data.reading.formats import Format
from moray.data.reading.parquet import row_groups
from moray.data.reading.sources import SourceFile

PIECE_BYTES = 64 << 20
LEAST_BYTES = 4 << 20
MANY = 16  # pieces of a file that is smaller than so many of the largest: for as many processes


@dataclass(frozen=True, slots=True)
class Piece:
    """A file; or the bytes of a .jsonl, or the row groups of a parquet, of a range, `n_before` records from its begin.

    size: bytes, about.
    """

    file: SourceFile
    size: int = 0
    range: tuple[int, int] | None = None
    n_before: int = 0


def pieces_of(file: SourceFile) -> Iterator[Piece]:
    """A file in pieces of 4 to 64 MiB, where its format lets it be cut. Reads a .jsonl once, for its lines."""
    most = min(max(file.size // MANY, LEAST_BYTES), PIECE_BYTES)
    if file.size <= most or file.format not in (Format("jsonl"), Format("parquet")):
        yield Piece(file, file.size)
        return
    with file.open() as content:
        cuts = _row_groups(content, most) if file.format == Format("parquet") else _lines(content, most)
        for start, stop, n_before, n_bytes in cuts:
            yield Piece(file, n_bytes, (start, stop), n_before)


def _lines(content: io.BufferedReader, most: int) -> Iterator[tuple[int, int, int, int]]:
    """Ranges that end behind a newline, with the lines before each."""
    start = at = n_before = n_lines = 0
    while block := content.read(BUFFER_BYTES):
        counted = 0  # of this block, the bytes whose lines are
        while (end := block.find(b"\n", max(start + most - at, counted)) + 1) > 0:
            yield start, at + end, n_before, at + end - start
            start, n_before = at + end, n_before + n_lines + block.count(b"\n", counted, end)
            n_lines, counted = 0, end
        n_lines += block.count(b"\n", counted)
        at += len(block)
    if at > start:
        yield start, at, n_before, at - start


def _row_groups(content: io.BufferedReader, most: int) -> Iterator[tuple[int, int, int, int]]:
    start = n_before = n_rows = n_bytes = 0
    groups = row_groups(content)
    for number, (rows, size) in enumerate(groups, 1):
        n_rows, n_bytes = n_rows + rows, n_bytes + size
        if n_bytes >= most or number == len(groups):
            yield start, number, n_before, n_bytes
            start, n_before, n_rows, n_bytes = number, n_before + n_rows, 0, 0


def within(file: io.BufferedReader, start: int, stop: int) -> io.BufferedReader:
    """The bytes of a file from `start` to `stop`."""
    file.seek(start)
    return io.BufferedReader(_Range(file, stop - start), BUFFER_BYTES)


class _Range(io.RawIOBase):
    def __init__(self, file: io.BufferedReader, length: int) -> None:
        self._file, self._left = file, length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        n = self._file.readinto(buffer[: self._left]) or 0
        self._left -= n
        return n
