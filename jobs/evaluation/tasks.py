"""Task files: JSON lines whose fields say what kind of task they are."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from moray import UserError
from moray.data.chat.turns import Turn
from moray.data.reading.compression import decompressed
from moray.data.reading.formats import format_of
from moray.data.reading.forms import examples
from moray.data.reading.json_files import read_values
from moray.data.reading.records import Damage, damage_of
from moray.data.reading.rules import Rules
from moray.data.reading.turns import Unfit
from moray.jobs.evaluation.numbers import number_behind_hashes


@dataclass(frozen=True)
class Item:
    """place: file and line, for errors; identity: its `id`, which need not be its own, if it has one."""

    place: str
    line: int
    identity: Any


@dataclass(frozen=True)
class Choice(Item):
    """Which of several texts goes on from the query; gold: the index of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Question(Item):
    """gold: the number that stands behind the answer's last ####."""

    question: str
    answer: str
    gold: str


@dataclass(frozen=True)
class Text(Item):
    text: str


@dataclass(frozen=True)
class Pair(Item):
    """Two answers to the same turns."""

    turns: tuple[Turn, ...]
    chosen: Turn
    rejected: Turn


@dataclass(frozen=True)
class Task:
    """A file's items, those which are examples (`--shots`) apart. sha256: of the file as it lies there."""

    path: Path
    sha256: str
    kind: type[Item]
    examples: list[Any]
    items: list[Any]


def read_task(path: Path, shots: int, limit: int | None) -> Task:
    """The first `shots` items as examples, and at most `limit` after them; what follows is not read.

    Raises UserError naming file and line for fields that fit no kind of task, or not the kind of the first line, and
    for a file that has no more than `shots` items.
    """
    items = list(islice(_items(path), None if limit is None else shots + limit))
    if not items:
        raise UserError(f"tasks={path} is empty: a task file holds a JSON object a line")
    if shots >= len(items):
        raise UserError(f"shots={shots} leaves nothing to score: {path} has {len(items)} items; give {len(items) - 1}"
                        " at most")  # fmt: skip
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Task(path, digest, type(items[0]), items[:shots], items[shots:])


def _items(path: Path) -> Iterator[Item]:
    """Raises UserError for what is no item of the first one's kind."""
    kind = None
    for line, value in _values(path):
        place = f"{path}, line {line}"
        if not isinstance(value, dict):
            raise UserError(f"{place}: must be an object, not {type(value).__name__}")
        kind = kind or _kind_of(value, place)
        if missing := [name for name in _KINDS[kind] if name not in value]:
            raise UserError(f"{place}: {' and '.join(missing)} missing; found {sorted(value)}, and the file's first "
                            f"item has {', '.join(_KINDS[kind])}")  # fmt: skip
        yield _READ[kind](Item(place, line, value.get("id")), value)


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise UserError(f"tasks={path} is no file; give JSON lines, for example arc.jsonl.gz")
    format = format_of(path.name)
    if format is None or format.kind != "jsonl":
        raise UserError(f"tasks={path} must be JSON lines: .jsonl or .ndjson, or one of these with .gz .zst .bz2 .xz")
    try:
        with open(path, "rb") as packed:
            yield from read_values(decompressed(packed, format.compression), Rules().max_record_bytes)
    except Exception as error:
        if (why := damage_of(error)) is None:
            raise
        raise UserError(f"{path}, {why}" if isinstance(error, Damage) else f"{path} cannot be read: {why}") from None


def _kind_of(value: dict[str, Any], place: str) -> type[Item]:
    for kind, fields in _KINDS.items():
        if {*fields} <= {*value}:
            return kind
    kinds = "; ".join(", ".join(fields) for fields in _KINDS.values())
    raise UserError(f"{place}: the fields {sorted(value)} fit no kind of task; one of: {kinds}")


def _choice(item: Item, value: dict[str, Any]) -> Choice:
    query, choices, gold = _string(item, value, "query"), value["choices"], value["gold"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{item.place}: choices={choices!r} must be a list of two texts at least")
    for choice in choices:
        if not _is_text(choice):
            raise UserError(f"{item.place}: choices holds {choice!r}; each must be a text that is not empty")
    if type(gold) is not int or not 0 <= gold < len(choices):  # True is an int to Python
        raise UserError(f"{item.place}: gold={gold!r} must be the index of the right choice, 0 to {len(choices) - 1}")
    return Choice(**vars(item), query=query, choices=tuple(choices), gold=gold)


def _question(item: Item, value: dict[str, Any]) -> Question:
    question, answer = _string(item, value, "question"), _string(item, value, "answer")
    gold = number_behind_hashes(answer)
    if gold is None:
        raise UserError(f"{item.place}: answer={answer[-80:]!r} must end in `#### N`, N being the number that is right")
    return Question(**vars(item), question=question, answer=answer, gold=gold)


def _text(item: Item, value: dict[str, Any]) -> Text:
    text = _string(item, value, "text")
    if not re.search(r"\S", text):
        raise UserError(f"{item.place}: text={text[:80]!r} must not be empty")
    return Text(**vars(item), text=text)


def _pair(item: Item, value: dict[str, Any]) -> Pair:
    (found,) = examples(value, "preference", Rules(kind="preference"))
    if isinstance(found, Unfit):
        raise UserError(f"{item.place}: {found.why or 'both answers are the same'}")
    turns, chosen, rejected = (found.content[name] for name in ("turns", "chosen", "rejected"))
    return Pair(**vars(item), turns=tuple(turns), chosen=chosen[0], rejected=rejected[0])


def _string(item: Item, value: dict[str, Any], field: str) -> str:
    if not _is_text(text := value[field]):
        raise UserError(f"{item.place}: {field}={text!r} must be a text that is not empty")
    return str(text)


def _is_text(value: Any) -> bool:
    """Whether it is a string of characters that UTF-8 can hold: JSON may have half of a surrogate pair."""
    return isinstance(value, str) and value != "" and not re.search("[\ud800-\udfff]", value)


_KINDS: dict[type[Item], tuple[str, ...]] = {
    Choice: ("query", "choices", "gold"),
    Pair: ("chosen", "rejected"),
    Question: ("question", "answer"),
    Text: ("text",),
}
_READ: dict[type[Item], Any] = {Choice: _choice, Pair: _pair, Question: _question, Text: _text}
