"""Dialogues as people keep them: instructions, prompts, questions, lists of messages."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moray.data.chat.turns import Turn
from moray.data.reading.records import Reason
from moray.data.reading.rules import Rules

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "environment"), "tool"),
}
"""What who speaks is called, in ShareGPT's and OpenAI's messages and elsewhere."""
DOCUMENT_END = "<|endoftext|>"
"""Which FLAN's completions end in, written out."""


class Unfit(Exception):  # noqa: N818
    """What cannot be used of a record of a known form, and why."""

    def __init__(self, reason: Reason, why: str) -> None:
        super().__init__(why)
        self.reason, self.why = reason, why


def dialogues(record: Mapping[str, Any], rules: Rules) -> Iterator[dict[str, Any] | Unfit] | None:
    """Those of a record, one for each answer that it has."""
    form = form_of(record)
    return None if form is None else _dialogues(form(record), rules)


def _dialogues(found: tuple[list[Turn], Sequence[str]], rules: Rules) -> Iterator[dict[str, Any] | Unfit]:
    asked, answers = found
    for answer in answers[:1] if rules.answers != "all" else answers:
        yield {"turns": [*asked, Turn("assistant", answer)]}
    if not answers:
        yield {"turns": asked}


Form = Callable[[Mapping[str, Any]], tuple[list[Turn], Sequence[str]]]
"""A record into turns and the answers to them, the best one first; without answers the turns have their own."""


def form_of(record: Mapping[str, Any]) -> Form | None:
    """How a record's turns are read; None: it holds no dialogue."""
    for fields, form in _FORMS:
        if all(field in record for field in fields.split()):
            return form
    return None


def string(record: Mapping[str, Any], field: str) -> str:
    """A field that holds a text, or nothing. Raises Unfit."""
    value = record.get(field)
    if not isinstance(value, str | None):
        raise Unfit(Reason.BAD, f"field {field!r} must be a string, not {type(value).__name__}")
    return value or ""


def messages(value: Any, field: str) -> list[Turn]:
    """A list of messages, OpenAI's (role, content) or ShareGPT's (from, value). Raises Unfit."""
    if not isinstance(value, list) or not value:
        raise Unfit(Reason.BAD, f"field {field!r} must be a list of messages, not {str(value)[:40]!r}")
    return [message(each, field) for each in value]


def message(value: Any, field: str) -> Turn:
    """One of them. Raises Unfit."""
    for role, content in (("role", "content"), ("from", "value"), ("speaker", "text")):
        if isinstance(value, dict) and role in value and (content in value or "tool_calls" in value):
            said = str(value[role])
            known = ROLES.get(said.lower())
            if known is None:
                raise Unfit(Reason.BAD, f"field {field!r}: {role}={said!r} is none of {', '.join(ROLES)}")
            return Turn(known, _text(value, content, field))  # type: ignore[arg-type]
    raise Unfit(Reason.BAD, f"field {field!r} must hold messages with role and content, not {str(value)[:60]!r}")


def _text(value: Mapping[str, Any], content: str, field: str) -> str:
    """A message's text; OpenAI may have it in parts, or calls of tools instead, which are written as JSON."""
    text = value.get(content)
    if isinstance(text, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in text):
        text = "".join(part["text"] for part in text)
    if calls := value.get("tool_calls"):
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise Unfit(Reason.BAD, f"field {field!r}: tool_calls must be a list of objects")
        text = "\n".join(filter(None, [text, *(as_json(call.get("function", call)) for call in calls)]))
    if not isinstance(text, str):
        raise Unfit(Reason.BAD, f"field {field!r}: {content} must be text, not {type(text).__name__}")
    return text


def asked(record: Mapping[str, Any], *fields: str) -> list[Turn]:
    """A user's turn of some fields, one below the other, after the record's system prompt, tools and history."""
    parts = [string(record, field).strip() for field in fields]
    return [*before(record), Turn("user", "\n\n".join(part for part in parts if part))]


def question_of(record: Mapping[str, Any]) -> list[Turn] | None:
    """What is asked in a record that has its answers elsewhere, under the usual names; None: it is not said apart."""
    for field in ("messages", "conversations", "conversation", "prompt"):
        if isinstance(record.get(field), list):
            said = messages(record[field], field)
            if said[-1].role in ("user", "tool"):  # or else it has an answer already
                return said if said[0].role == "system" else [*before(record), *said]
    for field in ("prompt", "question", "problem", "instruction", "query"):
        if isinstance(record.get(field), str):
            return asked(record, field, *(["input"] if field == "instruction" else []))
    return None


def before(record: Mapping[str, Any]) -> list[Turn]:
    """The system prompt, with the tools that a model may call, and the pairs of turns of LLaMA-Factory's `history`."""
    tools = record.get("tools") or ""
    parts = [string(record, "system").strip(), (tools if isinstance(tools, str) else as_json(tools)).strip()]
    system = "\n\n".join(part for part in parts if part)
    turns = [Turn("system", system)] if system else []
    history = record.get("history") or []
    if not isinstance(history, list) or not all(_is_exchange(each) for each in history):
        raise Unfit(Reason.BAD, "field 'history' must be a list of pairs, what was asked and what was answered")
    for asked, answered in history:
        turns += [Turn("user", asked), Turn("assistant", answered)]
    return turns


def _is_exchange(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _of_messages(field: str) -> Form:
    def read(record: Mapping[str, Any]) -> tuple[list[Turn], Sequence[str]]:
        said = messages(record[field], field)
        return ([] if said[0].role == "system" else before(record)) + said, ()

    return read


def _instruction(record: Mapping[str, Any]) -> tuple[list[Turn], Sequence[str]]:
    """Alpaca's; `outputs` are several reference answers."""
    answers = record["outputs"] if "outputs" in record else [record["output"]]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise Unfit(Reason.BAD, "field 'output' must be a string, and 'outputs' a list of such")
    if not answers:
        raise Unfit(Reason.EMPTY, "an answer is empty")
    return asked(record, "instruction", "input"), answers


def _prompt(answer: str, *fields: str) -> Form:
    def read(record: Mapping[str, Any]) -> tuple[list[Turn], Sequence[str]]:
        return asked(record, *fields), [string(record, answer).strip().removesuffix(DOCUMENT_END)]

    return read


def _spoken(record: Mapping[str, Any]) -> tuple[list[Turn], Sequence[str]]:
    """`{"dialogue": [{"speaker", "text"}], "response"}`: whoever spoke last is answered, by any name."""
    said = record["dialogue"]
    if not isinstance(said, list) or not all(isinstance(each, dict) and "speaker" in each for each in said) or not said:
        raise Unfit(Reason.BAD, "field 'dialogue' must be a list of objects with speaker and text")
    named = all(str(each["speaker"]).lower() in ROLES for each in said)
    last = said[-1]["speaker"]
    turns: list[Turn] = []
    for each in said:
        role = ROLES[str(each["speaker"]).lower()] if named else "user" if each["speaker"] == last else "assistant"
        text = string(each, "text")
        if turns and turns[-1].role == role:
            turns[-1] = Turn(turns[-1].role, f"{turns[-1].text}\n{text}")
        else:
            turns.append(Turn(role, text))  # type: ignore[arg-type]
    return [*before(record), *turns], [string(record, "response")]


_FORMS: Sequence[tuple[str, Form]] = (
    ("messages", _of_messages("messages")),
    ("conversations", _of_messages("conversations")),
    ("conversation", _of_messages("conversation")),
    ("dialogue response", _spoken),
    ("instruction output", _instruction),
    ("instruction outputs", _instruction),
    ("instruction response", _prompt("response", "instruction", "context")),
    ("question context answer", _prompt("answer", "context", "question")),
    ("question answer", _prompt("answer", "question")),
    ("prompt completion", _prompt("completion", "prompt")),
    ("prompt response", _prompt("response", "prompt")),
)
"""By the fields that a record must have. The last but two are FLAN's and GSM8K's, and question with context."""
