"""Dialogues, pairs of answers and prompts, out of the shuffle and into shards."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import tee
from typing import Any

import numpy as np

from moray import UserError
from moray.data.chat.turns import ChatTemplate, Rendered, Turn
from moray.data.index import Kind
from moray.data.reading.account import Account
from moray.data.reading.records import Loss, Reason
from moray.data.shards import TRAINED, SplitWriter
from moray.data.shuffle import Record
from moray.jobs.datasets.profile import Profile


def write_dialogues(
    records: Iterable[Record],
    kind: Kind,
    template: ChatTemplate,
    writer_of: Callable[[Record], SplitWriter],
    profile: Profile,
    account: Account,
) -> None:
    """Writes each record as one document, or a pair's as two. Notes what the template cannot write, which is left out.

    Trained on are all answers of a dialogue; of a pair's two, the one that differs; of a prompt, none.
    """
    if kind == "prompts":
        _write_prompts(records, template, writer_of, account)
        return
    records, again = tee(records)
    rendered = template.render(turns for record in again for turns in _whole(json.loads(record.text)))
    for record in records:
        content = json.loads(record.text)
        wholes = _whole(content)
        found = [next(rendered) for _ in wholes]
        if unwritten := [why for why in found if isinstance(why, str)]:
            account.note(Loss(Reason.UNWRITTEN, record.key.decode(), unwritten[0]))
            continue
        for number, (turns, each) in enumerate(zip(wholes, found, strict=True)):
            assert isinstance(each, Rendered)
            flags = _last_answer(each.flags) if kind == "preference" else each.flags
            key = record.key.decode()
            writer_of(record).add(key, each.tokens, flags, together=number > 0)
            answers = [turn.text.strip() for turn in turns if turn.role == "assistant"]
            profile.note(Rendered(each.tokens, flags), answers, len(turns))


def _write_prompts(
    records: Iterable[Record], template: ChatTemplate, writer_of: Callable[[Record], SplitWriter], account: Account
) -> None:
    for record in records:
        content = json.loads(record.text)
        (turns,) = _whole(content)
        try:
            tokens = np.array(template.prompt(turns), np.uint32)
        except UserError as error:
            account.note(Loss(Reason.UNWRITTEN, record.key.decode(), str(error)))
            continue
        flags = np.zeros(len(tokens), np.uint8)
        writer_of(record).add(record.key.decode(), tokens, flags, reference=content["reference"])


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
