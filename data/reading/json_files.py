"""JSON as people keep it: a record a line, an array of records, or one record a file.

Records are cut out of the file before they are parsed, so that a bad or an endless one costs itself alone.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from moray.data.reading.compression import BUFFER_BYTES
from moray.data.reading.records import BadRecord, Damage, Item, Loss, Reason, record_of
from moray.data.reading.rules import Rules

BLANK = b" \t\r\n\xef\xbb\xbf"  # and the bytes of a BOM
# What Python takes for an integer in good time; a longer one is read as a float.
MAX_DIGITS = 4000
# Every alternative begins with a letter of its own: that is what lets `re` pass quickly over what lies between.
_MARKS = re.compile(rb'\\.|"|\[|\]|\{|\}|,', re.DOTALL)


def read_json_lines(file: io.BufferedReader, rules: Rules, n_before: int = 0) -> Iterator[Item]:
    """A document a line, from the field of `rules`, named by its `id` if it has one, else by its line number, which
    counts the `n_before` lines that were read elsewhere.
    """
    yield from _line_items(_lines(file, rules.max_record_bytes), rules, n_before)


def read_values(file: io.BufferedReader, limit: int) -> Iterator[tuple[int, Any]]:
    """The value of every line that is not blank, with the line's number.

    Raises Damage, naming the line, for one that is not JSON or takes more than `limit` bytes.
    """
    for number, line in enumerate(_lines(file, limit), 1):
        if line is None:
            raise Damage(f"line {number}: a record of more than {limit:,} bytes")
        if not line.strip(BLANK):
            continue
        try:
            yield number, _parsed(line)
        except BadRecord as error:
            raise Damage(f"line {number}: {error}") from None


def read_json(file: io.BufferedReader, rules: Rules) -> Iterator[Item]:
    """A document an element of an array, or a line, or, where the file is a single value, a document a file."""
    limit = rules.max_record_bytes
    if file.peek(1).lstrip(BLANK)[:1] == b"[":
        for number, element in enumerate(_elements(file, limit), 1):
            if number == 1 and element and not element.startswith(b"{"):
                yield Loss(Reason.UNREAD, "", "an array, but not of objects")
                return
            yield _item(element, f"element {number}", number, rules)
        return
    lines = _lines(file, limit)
    first = next(lines, b"")
    if first is None or (file.peek(1) and _is_json(first)):
        yield from _line_items(chain([first], lines), rules)
    elif whole := first + file.read(limit):
        yield _item(whole if len(whole) <= limit else None, "", None, rules)


def _line_items(lines: Iterable[bytes | None], rules: Rules, n_before: int = 0) -> Iterator[Item]:
    for number, line in enumerate(lines, 1 + n_before):
        if line is not None and not line.strip(BLANK):
            continue
        item = _item(line, f"line {number}", number, rules)
        if line and not line.endswith(b"\n") and isinstance(item, Loss) and item.why.startswith("not JSON"):
            item = replace(item, why=f"{item.why}; the file ends in this line, it may have been cut off")
        yield item


def _lines(file: io.BufferedReader, limit: int) -> Iterator[bytes | None]:
    """The lines, and None for one of more than `limit` bytes, which is passed over without being held."""
    while line := file.readline(limit + 1):
        yield line if len(line) <= limit else None
        while len(line) > limit and not line.endswith(b"\n"):
            line = file.readline(limit + 1)


def _elements(file: io.BufferedReader, limit: int) -> Iterator[bytes | None]:
    """The elements of an array, and None for one of more than `limit` bytes, which is passed over."""
    element, depth, quoted = _Bounded(limit), 0, False
    while block := file.read1(BUFFER_BYTES):
        while block.endswith(b"\\"):  # an escape is never cut in two
            block += file.read(1) or b" "
        start = 0
        for found in _MARKS.finditer(block):
            mark = found[0]
            if mark == b'"':
                quoted = not quoted
            elif quoted or len(mark) > 1:
                continue
            elif mark in b"[{":
                depth += 1
                start = found.end() if depth == 1 else start
            else:
                depth -= mark != b","
                if depth == (mark == b","):  # the comma behind an element, or the bracket behind the last
                    element.add(block[start : found.start()])
                    yield from element.taken()
                    start = found.end()
        element.add(block[start:])
    if depth:
        raise Damage("the array does not end")
    yield from element.taken()  # what stands behind the array


class _Bounded:
    """Bytes that come in parts, or the fact that they were too many to be held."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size, self._held = limit, 0, bytearray()

    def add(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= self._limit:
            self._held += part

    def taken(self) -> Iterator[bytes | None]:
        if self._size > self._limit:
            yield None
        elif held := self._held.strip(BLANK):
            yield bytes(held)
        self._size, self._held = 0, bytearray()


def _item(raw: bytes | None, place: str, number: int | None, rules: Rules) -> Item:
    if raw is None:
        return Loss(Reason.LONG, place, f"a record of more than {rules.max_record_bytes:,} bytes")
    try:
        value = _parsed(raw)
    except BadRecord as error:
        return Loss(Reason.BAD, place, str(error))
    return record_of(value, place, number, rules)


def _is_json(raw: bytes) -> bool:
    try:
        _parsed(raw)
    except BadRecord:
        return False
    return True


def _parsed(raw: bytes) -> Any:
    try:
        return _DECODER.decode(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        if b"\0" in raw:
            raise BadRecord("NUL bytes, as a crash leaves where data was to come") from None
        raise BadRecord(f"not JSON ({error.msg}, character {error.pos + 1})") from None
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 ({error.reason}, byte {error.start + 1})") from None
    except RecursionError:
        raise BadRecord("nested too deeply") from None


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)
