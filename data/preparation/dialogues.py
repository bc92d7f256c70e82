"""Dialogues, pairs of answers and prompts, out of the shuffle and into shards."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import tee
from typing import Any

import numpy as np

from moray import UserError
from moray.data.chat.turns import ChatTemplate, Rendered, Turn
from moray.data.index import Kind
from moray.data.preparation.profile import Profile
from moray.data.preparation.runs import Record
from moray.data.shards import TRAINED, SplitWriter

LeaveOut = Callable[[Record, str], None]


def write_dialogues(
    records: Iterable[Record],
    kind: Kind,
    template: ChatTemplate,
    writer: SplitWriter,
    profile: Profile,
    leave_out: LeaveOut,
) -> None:
    """Writes each record as one document, or a pair's as two. What the template cannot write is left out, and told why.

    Trained on are all answers of a dialogue; of a pair's two, the one that differs; of a prompt, none.
    """
    if kind == "prompts":
        _write_prompts(records, template, writer, leave_out)
        return
    records, again = tee(records)
    rendered = template.render(turns for record in again for turns in _whole(json.loads(record.text)))
    for record in records:
        content = json.loads(record.text)
        wholes = _whole(content)
        found = [next(rendered) for _ in wholes]
        if unwritten := [why for why in found if isinstance(why, str)]:
            leave_out(record, unwritten[0])
            continue
        for number, (turns, each) in enumerate(zip(wholes, found, strict=True)):
            assert isinstance(each, Rendered)
            flags = _last_answer(each.flags) if kind == "preference" else each.flags
            key = record.key.decode()
            writer.add(key, each.tokens, flags, together=number > 0)
            answers = [turn.text.strip() for turn in turns if turn.role == "assistant"]
            profile.note(Rendered(each.tokens, flags), answers, len(turns))


def _write_prompts(records: Iterable[Record], template: ChatTemplate, writer: SplitWriter, leave_out: LeaveOut) -> None:
    for record in records:
        content = json.loads(record.text)
        (turns,) = _whole(content)
        try:
            tokens = np.array(template.prompt(turns), np.uint32)
        except UserError as error:
            leave_out(record, str(error))
            continue
        flags = np.zeros(len(tokens), np.uint8)
        writer.add(record.key.decode(), tokens, flags, reference=content["reference"])


def _whole(content: dict[str, Any]) -> list[list[Turn]]:
    """The dialogues of a record's content: the chosen one and the rejected one of a pair."""
    turns = [Turn(*turn) for turn in content["turns"]]
    sides = [side for side in ("chosen", "rejected") if side in content]
    return [[*turns, *(Turn(*turn) for turn in content[side])] for side in sides] or [turns]


def _last_answer(flags: np.ndarray) -> np.ndarray:
    """With the last run of tokens that are trained on as the only one."""
    trained = np.flatnonzero(flags & TRAINED)
    gaps = np.flatnonzero(np.diff(trained) > 1)
    kept = flags.copy()
    kept[: trained[gaps[-1] + 1] if len(gaps) else 0] &= ~np.uint8(TRAINED)
    return kept


def texts(record: Record) -> Iterator[str]:
    """What people wrote, for a tokenizer to be trained on."""
    for turns in _whole(json.loads(record.text)):
        yield from (turn.text for turn in turns)
