"""A chat template that came with a tokenizer: rendered as transformers does, its answers found by exact prefixes.

What is trained on is never guessed. An answer's tokens are those by which the dialogue with it goes on after the
dialogue before it. A template that writes earlier turns otherwise once later ones are there has no such: it is refused.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moray import UserError
from moray.data.chat.turns import Rendered, Turn
from moray.data.shards import TRAINED, USER_TURN
from moray.data.tokenizer import Tokenizer


class Refused(Exception):  # noqa: N818
    """What a template itself says against a dialogue, or fails of."""


class JinjaTemplate:
    """Any chat template. Control tokens in what people wrote would be read as such: such dialogues are left out, and so
    are those that the template refuses (some know no system's turn, or no tools).
    """

    def __init__(self, jinja: str, tokenizer: Tokenizer, name: object) -> None:
        """name: of the tokenizer's folder, for errors."""
        self.jinja, self._tokenizer, self._name = jinja, tokenizer, name
        try:
            self._template = _environment().from_string(jinja)
        except TemplateError as error:
            raise UserError(f"the chat template of tokenizer={str(name)!r} is no Jinja: {error}") from None
        self.turn_end = self._find_turn_end()
        self._stops = {*tokenizer.stop_ids, *([] if self.turn_end is None else [self.turn_end])}

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        # What the model itself wrote is read as it wrote it.
        if mark := self._control_token([turn for turn in turns if turn.role != "assistant"]):
            raise UserError(f"the text holds {mark}, which is a control token of the model; write it another way")
        try:
            return self._ids(self._text(turns, answer_follows=True))
        except Refused as refusal:
            said = f"the chat template of tokenizer={str(self._name)!r} refuses a dialogue of "
            raise UserError(f"{said}{', '.join(turn.role for turn in turns)}: {refusal}") from None

    def render(self, dialogues: Iterable[Sequence[Turn]]) -> Iterator[Rendered | str]:
        for turns in dialogues:
            if mark := self._control_token(turns):
                yield f"the control token {mark} in a text"
                continue
            try:
                yield self._rendered(turns)
            except Refused as refusal:
                yield f"refused: {refusal}"

    def _find_turn_end(self) -> int | None:
        """The control token behind an answer. A base model's folder may not count it among those that end a text."""
        asked, answered = Turn("user", "a"), Turn("assistant", "b")
        try:
            whole, before = self._text([asked, answered]), self._text([asked], answer_follows=True)
        except Refused:
            return None
        ids = self._ids(whole)[len(self._ids(before)) :] if whole.startswith(before) else []
        return next((token for token in ids if self._word(token) in self._controls), None)

    def _rendered(self, turns: Sequence[Turn]) -> Rendered:
        whole = self._text(turns)
        ids = self._ids(whole)
        flags = np.zeros(len(ids), np.uint8)
        flags[self._first_user(turns, whole, ids)] = USER_TURN
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            start = len(self._prefix(turns[:number], whole, ids, answer_follows=True))
            end = len(self._prefix(turns[: number + 1], whole, ids))
            stops = [at for at in range(start, end) if ids[at] in self._stops]
            if not stops:
                raise UserError(
                    f"the chat template of tokenizer={str(self._name)!r} ends an answer by none of the tokens at which "
                    f"the model stops ({', '.join(map(self._word, self._tokenizer.stop_ids))}): it would never end one"
                )
            flags[start : stops[-1] + 1] |= TRAINED
            if number + 1 < len(turns) and turns[number + 1].role == "user":
                flags[end] |= USER_TURN
        return Rendered(np.array(ids, self._tokenizer.dtype), flags)

    def _prefix(self, turns: Sequence[Turn], whole: str, ids: list[int], *, answer_follows: bool = False) -> list[int]:
        """The tokens of some first turns. Raises UserError where the whole does not begin with them."""
        text = self._text(turns, answer_follows=answer_follows)
        prefix = self._ids(text)
        said = f"the chat template of tokenizer={str(self._name)!r} "
        if not whole.startswith(text):
            raise UserError(
                f"{said}writes {len(turns)} turns otherwise once others follow (it drops or rewrites history), so that "
                f"nothing tells which tokens an answer is; give the tokenizer's folder another {CHAT_TEMPLATE}"
            )
        if ids[: len(prefix)] != prefix:
            raise UserError(
                f"{said}ends {len(turns)} turns in {text[-10:]!r}, which becomes other tokens once more follows: what "
                f"is asked would not be what was trained; give the tokenizer's folder another {CHAT_TEMPLATE}"
            )
        return prefix

    def _first_user(self, turns: Sequence[Turn], whole: str, ids: list[int]) -> int:
        """Where the first user's turn begins; a system prompt that the template has within that belongs to it."""
        if turns[0].role == "system":
            with suppress(Refused, UserError):
                return len(self._prefix(turns[:1], whole, ids))
        start = list(self._tokenizer.document_start)
        return len(start) if ids[: len(start)] == start else 0

    def _text(self, turns: Sequence[Turn], *, answer_follows: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.text.strip()} for turn in turns]
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=answer_follows, tools=None, documents=None, **self._marks
            )
        except Exception as error:  # a template is a program of its own
            raise Refused(
                f"{error}" if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            ) from None

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def _word(self, token: int) -> str:
        return self._tokenizer.backend.id_to_token(token) or str(token)

    def _control_token(self, turns: Sequence[Turn]) -> str | None:
        return next((mark for mark in self._controls for turn in turns if mark in turn.text), None)

    @cached_property
    def _controls(self) -> list[str]:
        added = self._tokenizer.backend.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    @cached_property
    def _marks(self) -> dict[str, str]:
        ids = {"bos_token": self._tokenizer.bos_id, "eos_token": self._tokenizer.eos_id}
        ids["pad_token"] = self._tokenizer.pad_id
        return {name: self._word(token) for name, token in ids.items() if token is not None}


CHAT_TEMPLATE = "chat_template.jinja"


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers' `chat_template_utils` has it."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    now = datetime.now()  # one day for all dialogues
    environment.globals["strftime_now"] = now.strftime
    return environment


class _Generation(Extension):
    """`{% generation %}` marks what a model wrote, for others: here it is a block like any."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
