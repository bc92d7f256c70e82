"""The number that an answer comes to."""

import re
from decimal import Decimal

HASHES = "####"
# A minus behind a digit subtracts; elsewhere it is the number's sign.
_NUMBER = re.compile(r"(?<![\d.])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", re.ASCII)


def number_of(text: str) -> str | None:
    """The last number behind the last ####; without one, the last number of the text; None where there is none."""
    return number_behind_hashes(text) or _last_number(text)


def number_behind_hashes(text: str) -> str | None:
    """The last number behind the last ####, as GSM8K's answers end."""
    _, hashes, end = text.rpartition(HASHES)
    return _last_number(end) if hashes else None


def are_equal(one: str, other: str | None) -> bool:
    """Whether they are the same number: 1,234 and 1234.0 are."""
    return other is not None and _value(one) == _value(other)


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return found[-1].rstrip(",") if found else None


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))
