"""Rewards that need no function of the user's: each is 1 where an answer is right, else 0."""

import json
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from moray.jobs.alignment.rewards import Reward, Sample
from moray.jobs.evaluation.numbers import are_equal, number_behind_hashes, number_of

Function = Callable[[Sample], float]
_WHOLE_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", re.ASCII)


def builtin(reward: Reward) -> Function:
    """The function of a built-in reward."""
    if reward.name == "exact":
        return exact
    return matches(reward.argument) if reward.name.startswith("format:") else gsm8k(bool(reward.argument))


def exact(sample: Sample) -> float:
    """Whether the answer is the reference or one of several, but for case, white space and the way accents are encoded.

    Punctuation counts: -5 is not 5. Raises ValueError for a reference of fields.
    """
    answer = _normalised(sample.answer)
    return float(any(answer == _normalised(_text(each)) for each in _references(sample.reference)))


def gsm8k(flexible: bool) -> Function:
    """Whether the answer's number is the reference's, or that of one of several.

    It is the last number behind the last ####, as `moray evaluate` reads it: sign and decimals count, commas do not,
    and a list of guesses is one guess. flexible: without ####, the last number of the answer.
    """
    read = number_of if flexible else number_behind_hashes

    def judge(sample: Sample) -> float:
        """Raises ValueError for a reference without a number."""
        found = read(sample.answer)
        right = [_number(each) for each in _references(sample.reference)]
        return float(any(are_equal(each, found) for each in right))

    return judge


def matches(pattern: str) -> Function:
    """Whether the regular expression matches the whole answer. As in `re`, a dot is no line break but behind (?s)."""
    expression = re.compile(pattern)
    return lambda sample: float(expression.fullmatch(sample.answer) is not None)


def _references(reference: Any) -> list[Any]:
    several = reference if isinstance(reference, list) else [reference]
    if not several or any(each is None or isinstance(each, list | dict) for each in several):
        raise ValueError(f"the reference must be a text, a number or a list of such, not {_beginning(reference)}")
    return several


def _text(reference: Any) -> str:
    return reference if isinstance(reference, str) else json.dumps(reference)


def _number(reference: Any) -> str:
    """A reference is all number, or ends in `#### N`: of `3/4`, neither number is meant."""
    # Floats as a person writes them: 1e16 has digits, too.
    text = f"{Decimal(str(reference)):f}" if isinstance(reference, float) else _text(reference)
    number = number_behind_hashes(text) or (text.strip() if _WHOLE_NUMBER.fullmatch(text.strip()) else None)
    if number is None:
        raise ValueError(f"the reference must be a number, or end in `#### N`, not {_beginning(reference)}")
    return number


def _beginning(reference: Any) -> str:
    return json.dumps(reference, ensure_ascii=False)[:80]


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
