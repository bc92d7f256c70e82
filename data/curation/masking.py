"""Puts placeholders for e-mail addresses, public IP addresses and card numbers.

Every pattern begins where a run of its characters begins (a look behind) and is bounded or runs over characters that
end it, so the time is linear in the text, whatever is in it. A placeholder is never masked into another text, and is
the same everywhere: a text's masking depends on the text alone.
"""

import ipaddress
import re
from collections.abc import Collection

EMAIL = "email@example.com"
"""FineWeb's (datatrove, formatters/pii.py), which takes turns with a second one; RFC 2606 keeps the domain unused."""
IP_V4, IP_V6 = "192.0.2.1", "2001:db8::1"
"""Addresses for documentation (RFC 5737, RFC 3849), where FineWeb's belong to somebody."""
CARD = "0000-0000-0000-0000"
"""No card begins with a zero."""

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]++@(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9_])"
)
_IP_V4 = re.compile(r"(?<![A-Za-z0-9_.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![A-Za-z0-9_]|\.[0-9])")
# Global unicast addresses begin with 2 or 3 (RFC 4291); `a::b` is code.
_IP_V6 = re.compile(r"(?<![A-Za-z0-9_:.])[23][0-9A-Fa-f]{3}(?:::?[0-9A-Fa-f]{1,4}){1,7}(?![:.]?[A-Za-z0-9_])")
_CARD = re.compile(r"(?<![A-Za-z0-9_.,-])(?<![0-9] )(?:[0-9][ -]?){12,18}[0-9](?![A-Za-z0-9_]|[ .,-][0-9])")
# Visa; Mastercard; American Express, Diners and JCB; Maestro, UnionPay and Discover. ISO/IEC 7812: what a number
# begins with names its issuer. Books' ISBNs (978…) and most runs of years are none.
_ISSUERS = re.compile(r"4|5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720|3|6[0245]")


def masked(text: str, kinds: Collection[str]) -> str:
    """`kinds`: of "email", "ip" and "card"; they are masked in this order."""
    if "email" in kinds:
        text = _EMAIL.sub(EMAIL, text)
    if "ip" in kinds:
        text = _IP_V6.sub(_ip, _IP_V4.sub(_ip, text))
    if "card" in kinds:
        text = _CARD.sub(_card, text)
    return text


def _ip(found: re.Match[str]) -> str:
    """Private and reserved addresses stay, as in FineWeb: they name nobody, and manuals are full of them."""
    try:
        address = ipaddress.ip_address(found[0])
    except ValueError:
        return found[0]
    if not address.is_global:
        return found[0]
    return IP_V4 if address.version == 4 else IP_V6


def _card(found: re.Match[str]) -> str:
    digits = found[0].replace(" ", "").replace("-", "")
    return CARD if _ISSUERS.match(digits) and luhn(digits) else found[0]


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of those before it. Source: ISO/IEC 7812-1, annex B."""
    doubled = (int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits)))
    return sum(number - 9 if number > 9 else number for number in doubled) % 10 == 0
