"""The forms in which people keep dialogues, pairs of answers and prompts, and how each is read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moray.data.chat.turns import Turn, mistake_in
from moray.data.index import Kind
from moray.data.reading import pairs, prompts, trees, turns
from moray.data.reading.records import Reason
from moray.data.reading.rules import Rules
from moray.data.reading.turns import Unfit

FIELDS_NAMED = 12


class Example(NamedTuple):
    """What one document is made of, as JSON: its turns and, of a pair, both answers; of a prompt, the reference.

    group: what the validation split keeps together, the first thing that a user says.
    """

    content: dict[str, Any]
    group: str


Reader = Callable[[Mapping[str, Any], Rules], Iterator[dict[str, Any] | Unfit] | None]
"""None: the record is of another form."""
READERS: Mapping[Kind, Sequence[Reader]] = {
    "text": (),
    "chat": (trees.dialogues, turns.dialogues),
    "preference": (trees.ranked_pairs, pairs.pairs),
    "prompts": (prompts.prompts,),
}


def examples(record: Any, kind: Kind, rules: Rules) -> Iterator[Example | Unfit]:
    """The documents of a record, and what of it is none, and why."""
    if not isinstance(record, dict):
        yield Unfit(Reason.BAD, f"must be an object, not {type(record).__name__}")
        return
    try:
        found = next((found for read in READERS[kind] if (found := read(record, rules)) is not None), None)
        if found is None:
            names = sorted(map(str, record))
            more = " and more" * (len(names) > FIELDS_NAMED)
            yield Unfit(Reason.BAD, f"of no form that is known as {kind}; its fields: {names[:FIELDS_NAMED]}{more}")
            return
        for content in found:
            yield content if isinstance(content, Unfit) else _checked(content)
    except Unfit as unfit:
        yield unfit


def _checked(content: dict[str, Any]) -> Example | Unfit:
    whole = [Turn(*turn) for turn in content["turns"]]
    ends = [[*whole, *(Turn(*turn) for turn in content[side])] for side in ("chosen", "rejected") if side in content]
    for turns_ in ends or [whole]:
        if mistake := mistake_in(turns_):
            return Unfit(Reason.BAD, mistake)
        if any(not turn.text.strip() for turn in turns_ if turn.role == "assistant"):
            return Unfit(Reason.EMPTY, "an answer is empty")
        if "reference" not in content and not any(turn.role == "assistant" for turn in turns_):
            return Unfit(Reason.BAD, "nobody answers")
        if "reference" in content and turns_[-1].role not in ("user", "tool"):
            return Unfit(Reason.BAD, f"a prompt must end in a user's turn, not in {turns_[-1].role}'s")
    if ends and ends[0] == ends[1]:
        return Unfit(Reason.ALIKE, "")
    return Example(content, next(turn.text.strip() for turn in whole if turn.role == "user"))


def kinds_of(record: Any, text_field: str) -> list[Kind]:
    """What kinds a record may be, by its fields."""
    if not isinstance(record, dict):
        return []
    first, dot, _ = text_field.partition(".")
    if text_field in record or (dot and first in record):
        return ["text"]
    if pairs.sides(record):
        return ["preference"]
    found: list[Kind] = ["chat"] if trees.is_tree(record) or turns.form_of(record) else []
    return [*found, "prompts"] if prompts.reference_of(record) is not None else found
