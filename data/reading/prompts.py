"""Prompts whose answers can be checked against a reference."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from moray.data.reading.records import Reason
from moray.data.reading.rules import Rules
from moray.data.reading.turns import Unfit, question_of

MARK = "####"
"""Before the answer itself, in GSM8K."""
_NUMBER = re.compile(r"\s*(-?[\d,]*\.?\d+)")
REFERENCES = ("reference", "reference_answer", "ground_truth", "gold", "target", "solution", "label")


def reference_of(record: Mapping[str, Any]) -> Any:
    """What an answer is compared with; None: the record has no such.

    Of GSM8K's answers, the number behind the last mark, with its sign and without commas.
    """
    for name in REFERENCES:
        if record.get(name) is not None:
            return record[name]
    judged = record.get("reward_model")  # verl's
    if isinstance(judged, dict) and judged.get("ground_truth") is not None:
        return judged["ground_truth"]
    answer = record.get("answer")
    if not isinstance(answer, str) or MARK not in answer:
        return None
    end = answer.rpartition(MARK)[2]
    return found[1].replace(",", "") if (found := _NUMBER.match(end)) else end.strip()


def prompts(record: Mapping[str, Any], _: Rules) -> Iterator[dict[str, Any] | Unfit] | None:
    reference = reference_of(record)
    reference = record.get("answer") if reference is None else reference
    turns = question_of(record)
    if reference is None or turns is None:
        return None
    if not isinstance(reference, str | int | float | list | dict):
        raise Unfit(Reason.BAD, f"a reference must be text, a number or JSON, not {type(reference).__name__}")
    if reference == "":
        raise Unfit(Reason.EMPTY, "the reference is empty")
    return iter([{"turns": turns, "reference": reference}])
