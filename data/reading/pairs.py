"""Pairs of answers of which people, or a model, preferred one."""

from collections.abc import Iterator, Mapping
from typing import Any

from moray.data.chat.turns import Turn
from moray.data.reading.records import Reason
from moray.data.reading.rules import Rules
from moray.data.reading.turns import Unfit, message, messages, question_of

SIDES = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("response_j", "response_k"),
)


def sides(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The fields of the preferred answer and of the other one."""
    return next((names for names in SIDES if all(name in record for name in names)), None)


def pairs(record: Mapping[str, Any], _: Rules) -> Iterator[dict[str, Any] | Unfit] | None:
    names = sides(record)
    return None if names is None else iter([_pair(record, *names)])


def _pair(record: Mapping[str, Any], better: str, worse: str) -> dict[str, Any]:
    chosen, rejected = (_answer(record[name], name) for name in (better, worse))
    turns = question_of(record)
    if turns is None:  # two whole dialogues, which begin alike
        length = next((n for n, both in enumerate(zip(chosen, rejected, strict=False)) if both[0] != both[1]), 0)
        length = length or min(len(chosen), len(rejected)) - 1
        turns, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    elif chosen[: len(turns)] == turns == rejected[: len(turns)]:  # both of them repeat what was asked
        chosen, rejected = chosen[len(turns) :], rejected[len(turns) :]
    for name, answer in ((better, chosen), (worse, rejected)):
        if len(answer) != 1 or answer[0].role != "assistant":
            raise Unfit(Reason.BAD, f"field {name!r} must be one answer to what both were asked")
    return {"turns": turns, "chosen": chosen, "rejected": rejected}


def _answer(value: Any, field: str) -> list[Turn]:
    if isinstance(value, str):
        return [Turn("assistant", value)]
    return [message(value, field)] if isinstance(value, dict) else messages(value, field)
