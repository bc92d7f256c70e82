"""`moray chat`: a conversation in the terminal, or a line a message from a pipe."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from moray import UserError
from moray.data.chat.templates import chat_template_of, stated_template
from moray.jobs.generation.conversation import Conversation
from moray.jobs.generation.generate import Sampling, load
from moray.jobs.models.weights import open_whole

HELP = """\
/retry         another answer to the last message
/undo          take back the last message and its answer
/system TEXT   set the system prompt, or without TEXT take it away
/clear         begin anew, with the same system prompt
/save FILE     write the conversation as JSON, as OpenAI's API has messages
/help          these lines
/exit          leave, as does Ctrl-D; Ctrl-C ends an answer"""


def chat(run: Path, sampling: Sampling, system: str, max_new_tokens: int | None, tell: Callable[[str], None]) -> int:
    """Talks until the user leaves; returns the exit code. Raises UserError for what cannot be talked with."""
    weights = open_whole(run, tell)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    template = chat_template_of(weights.tokenizer)
    if stated_template(weights.tokenizer) is None:
        tell(f"{run} has no chat template, so that it was hardly tuned on dialogues: expect text that goes on and on")
    decoder, tokenizer = load(weights)
    conversation = Conversation(decoder, tokenizer, template, sampling, max_new_tokens)
    conversation.instruct(system)
    is_person = sys.stdin.isatty()
    if is_person:
        with suppress(ImportError):  # so that lines can be edited
            import readline  # noqa: F401
        tell(f"{decoder.config.max_seq_len} tokens of memory; /help says what else can be said")
    for line in _lines("> " if is_person else ""):
        if line in ("/exit", "/quit"):
            break
        try:
            _react(conversation, line, tell)
        except UserError as error:
            tell(str(error))
    return 0


def _lines(prompt: str) -> Iterator[str]:
    """What the user says, until Ctrl-D or the pipe's end."""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line:
            yield line


def _react(conversation: Conversation, line: str, tell: Callable[[str], None]) -> None:
    command, _, rest = line.partition(" ")
    if not command.startswith("/"):
        _answer(conversation, line, tell)
    elif command == "/retry":
        if text := conversation.undo():
            _answer(conversation, text, tell)
        else:
            tell("nothing was said yet")
    elif command == "/undo":
        text = conversation.undo()
        tell("nothing was said yet" if text is None else f"taken back: {text}")
    elif command == "/system":
        conversation.instruct(rest.strip())
    elif command == "/clear":
        conversation.turns = conversation.system
    elif command == "/save":
        _save(conversation, rest.strip(), tell)
    elif command == "/help":
        tell(HELP)
    else:
        tell(f"{command} is no command; /help lists them")


def _answer(conversation: Conversation, text: str, tell: Callable[[str], None]) -> None:
    answer = conversation.ask(text)
    if conversation.forgotten:
        tell(f"the first {conversation.forgotten} turns are forgotten: the model has no room for them any more")
    try:
        for part in answer:
            print(part, end="", flush=True)
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]
        print()
        return
    print()
    if conversation.cut:
        tell("the answer was cut off: it reached --max-new-tokens, or the model's length")


def _save(conversation: Conversation, name: str, tell: Callable[[str], None]) -> None:
    if not name:
        tell("/save FILE: name a file")
        return
    try:
        Path(name).expanduser().write_text(json.dumps(conversation.messages(), indent=1, ensure_ascii=False) + "\n")
        tell(f"saved {len(conversation.turns)} turns in {name}")
    except OSError as error:
        tell(f"{name}: {error.strerror}")
