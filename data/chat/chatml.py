"""ChatML, the chat template of tokenizers that have none of their own.

A dialogue is rendered from parts, control tokens as ids and what people wrote as plain text: `<|im_end|>` in a question
ends nothing. The same template is written in Jinja, for whoever serves the model; `transformers` makes the same ids and
the same mask of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import get_args

import numpy as np

from moray import UserError
from moray.data.chat.turns import Rendered, Role, Turn
from moray.data.shards import TRAINED, USER_TURN
from moray.data.special_tokens import IM_END, IM_START
from moray.data.tokenizer import Tokenizer

AT_A_TIME = 256
"""Dialogues that are encoded together."""


class ChatML:
    """`<|im_start|>role\\ntext<|im_end|>\\n`, a turn after the other, behind what the tokenizer begins a document with.

    Raises UserError for a tokenizer of which the two marks are no tokens, or that joins what stands beside them.
    """

    def __init__(self, tokenizer: Tokenizer, name: object = "") -> None:
        """name: of the tokenizer's folder, for errors."""
        self._tokenizer = tokenizer
        begin, end = (tokenizer.backend.token_to_id(mark) for mark in (IM_START, IM_END))
        if begin is None or end is None:
            raise UserError(
                f"tokenizer={str(name)!r} has no chat template, and {IM_START} and {IM_END}, which dialogues are "
                "written with then, are not tokens of it; take a tokenizer that has either"
            )
        self.turn_end: int | None = end
        self._end = end
        self._headers = {role: [begin, *tokenizer.encode(f"{role}\n")] for role in get_args(Role)}
        self._newline = tokenizer.encode("\n")
        start = "".join(tokenizer.backend.id_to_token(token) or "" for token in tokenizer.document_start)
        self.jinja = _JINJA.replace("START", start.replace("'", "\\'"))
        self._check(start, name)

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        said = self._joined([(turn.role, text) for turn, text in zip(turns, self._encoded(turns), strict=True)])
        return [*said.tokens.tolist(), *self._headers["assistant"]]

    def render(self, dialogues: Iterable[Sequence[Turn]]) -> Iterator[Rendered | str]:
        rest = iter(dialogues)
        while some := list(islice(rest, AT_A_TIME)):
            encoded = iter(self._encoded([turn for turns in some for turn in turns]))
            for turns in some:
                yield self._joined([(turn.role, next(encoded)) for turn in turns])

    def _joined(self, turns: Sequence[tuple[Role, Sequence[int]]]) -> Rendered:
        start = self._tokenizer.document_start
        parts: list[tuple[Sequence[int], int]] = [(start, 0)]
        for role, text in turns:
            first, *header = self._headers[role]
            said = TRAINED if role == "assistant" else 0
            parts += [([first], USER_TURN if role == "user" else 0), (header, 0), ([*text, self._end], said)]
            parts.append((self._newline, 0))
        tokens = np.array([token for ids, _ in parts for token in ids], self._tokenizer.dtype)
        return Rendered(tokens, np.repeat([flag for _, flag in parts], [len(ids) for ids, _ in parts]).astype(np.uint8))

    def _encoded(self, turns: Sequence[Turn]) -> list[list[int]]:
        return list(self._tokenizer.encode_plain([turn.text.strip() for turn in turns]))

    def _check(self, start: str, name: object) -> None:
        """That the parts are the tokens of the whole, which is what others will make of the template."""
        said = "".join(f"{IM_START}{turn.role}\n{turn.text}{IM_END}\n" for turn in _PROBE)
        (rendered,) = self.render([_PROBE])
        assert isinstance(rendered, Rendered)
        if self._tokenizer.encode(start + said) != rendered.tokens.tolist():
            raise UserError(
                f"tokenizer={str(name)!r} joins what stands beside {IM_START} and {IM_END}, so that a dialogue's parts "
                "are not the tokens of the whole; give it a chat template of its own, or take another"
            )


_PROBE = (Turn("system", "Be brief."), Turn("user", "1 + 1?"), Turn("assistant", "2"), Turn("user", "Why?\n\nAnd"))
_JINJA = """\
{{- 'START' }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
        {{- message['content'] | trim + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
