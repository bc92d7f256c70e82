"""What a reader of any format yields: a record with its place in the file, or what is lost there and why."""

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from lzma import LZMAError
from tarfile import TarError
from typing import Any, TypeAlias

from moray.data.reading.rules import Rules

FIELDS_NAMED = 12
MAX_ID = 200  # characters; an `id` above that is none


class Reason(StrEnum):
    """Why something is not in the corpus as it stands in its file."""

    BAD = "bad records"
    DAMAGED = "damaged files"
    UNREAD = "not read"
    EMPTY = "empty"
    LONG = "too long"
    CUT = "cut"
    REFUSED = "refused by people"
    ALIKE = "pairs of equal answers"


@dataclass(frozen=True, slots=True)
class Record:
    """A text: its place and its name within its file (both empty for a whole file), and its bytes, to be read once."""

    place: str
    name: str
    blocks: Iterable[bytes]

    def within(self, place: str, name: str) -> "Record":
        return Record(_joined(place, ", ", self.place), _joined(name, ":", self.name), self.blocks)


@dataclass(frozen=True, slots=True)
class Loss:
    """Something that is not read, where it stands, and what is wrong with it."""

    reason: Reason
    place: str
    why: str = ""

    def within(self, place: str, name: str) -> "Loss":
        return Loss(self.reason, _joined(place, ", ", self.place), self.why)

    def __str__(self) -> str:
        text = _joined(self.place, ": ", self.why)
        return text.encode(errors="replace").decode()  # names of files may be no UTF-8


Item: TypeAlias = Record | Loss


class BadRecord(Exception):  # noqa: N818
    """Raised by a record's blocks: the rest of it cannot be read, and the file goes on."""


class Damage(Exception):  # noqa: N818
    """Raised by a reader: the rest of the file cannot be read."""


def damage_of(error: Exception) -> str | None:
    """What an error of a file or of its format says of it, in one line; None for any other error."""
    # zstandard and pyarrow are optional, so that their exceptions cannot be named.
    optional = type(error).__module__.partition(".")[0] in ("zstandard", "pyarrow")
    if not optional and not isinstance(error, Damage | OSError | EOFError | zlib.error | LZMAError | TarError):
        return None
    return in_one_line(error)


def in_one_line(error: Exception) -> str:
    """What an error says, or its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def record_of(value: Any, place: str, number: int | None, rules: Rules) -> Item:
    """The string under `text_field` of a parsed record, or all of it as JSON; named by its `id` or its number.

    Without a number it is all that its file holds, and may be something else: settings, an index, a description.
    """
    field, unfit = rules.text_field, Reason.UNREAD if number is None else Reason.BAD
    if rules.kind != "text":
        name = "" if number is None else name_of(value.get("id") if isinstance(value, dict) else None, number)
        return Record(place, name, (json.dumps(value).encode(),))
    if not isinstance(value, dict):
        return Loss(unfit, place, f"must be an object with a field {field!r}, not {type(value).__name__}")
    found, text = _at(value, field)
    if not found:
        return Loss(unfit, place, missing("field", field, _names(value)))
    if text is None:
        return Loss(Reason.EMPTY, place)
    if not isinstance(text, str):
        return Loss(Reason.BAD, place, f"field {field!r} must be a string, not {type(text).__name__}")
    try:
        name = "" if number is None else name_of(value.get("id"), number)
        return Record(place, name, (text.encode(),))
    except UnicodeEncodeError:
        return Loss(Reason.BAD, place, "not UTF-8 (half of a surrogate pair)")


def missing(what: str, field: str, names: Sequence[str]) -> str:
    """What is said where there is no such field or column, and what there is instead."""
    found = f"{list(names[:FIELDS_NAMED])}{' and more' * (len(names) > FIELDS_NAMED)}"
    return f"no {what} {field!r}; found {found}; name the right one with --text-field"


def name_of(identity: Any, number: int) -> str:
    """A record's own `id`, or else its number."""
    identity = identity.decode("utf-8", "replace") if isinstance(identity, bytes) else identity
    usable = isinstance(identity, str | int) and 0 < len(str(identity)) <= MAX_ID
    return str(identity if usable else number)


def _at(value: Any, field: str) -> tuple[bool, Any]:
    """Whether there is such a field, and what it holds: the one of that very name, or else down the dotted path."""
    if isinstance(value, dict) and field in value:
        return True, value[field]
    first, dot, rest = field.partition(".")
    if not dot or not isinstance(value, dict) or first not in value:
        return False, None
    return (True, None) if value[first] is None else _at(value[first], rest)


def _names(record: dict[str, Any]) -> list[str]:
    """The fields of a record, and those below them."""
    below = ((name, inner if isinstance(inner, dict) else ("",)) for name, inner in record.items())
    return sorted(_joined(name, ".", deeper) for name, inner in below for deeper in inner)


def _joined(outer: str, mark: str, inner: str) -> str:
    return f"{outer}{mark}{inner}" if outer and inner else outer or inner
