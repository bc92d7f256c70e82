"""A conversation with a model: the turns so far, what of them the model has room for, and its answers as they come."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from moray import UserError
from moray.data.chat.turns import ChatTemplate, Turn
from moray.data.tokenizer import Tokenizer
from moray.jobs.generation.generate import USUAL_NEW_TOKENS, Sampling, generate_tokens, stream_text
from moray.model import Decoder

CONTEXT_TOKENS = 8
"""Before an answer's first token, of which some tokenizers make the beginning of its text."""


@dataclass
class Conversation:
    """turns: all that was said, the system prompt first if there is one. forgotten: turns for which there was no room
    any more when the last answer was written. cut: whether that reached its limit before it had ended.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    template: ChatTemplate
    sampling: Sampling
    max_new_tokens: int | None = None
    turns: list[Turn] = field(default_factory=list)
    forgotten: int = 0
    cut: bool = False
    _answers: int = 0

    @property
    def system(self) -> list[Turn]:
        return self.turns[:1] if self.turns[:1] and self.turns[0].role == "system" else []

    def instruct(self, text: str) -> None:
        """Sets the system prompt, or takes it away."""
        self.turns = [*([Turn("system", text)] if text else []), *self.turns[len(self.system) :]]

    def ask(self, text: str) -> Iterator[str]:
        """Adds what a user says, and yields the answer in pieces; what was written of it by then stays said.

        Raises UserError, and the user has said nothing, where that alone leaves no room for an answer.
        """
        before = list(self.turns)
        self.turns.append(Turn("user", text))
        try:
            prompt = self._prompt()
        except UserError:
            self.turns = before
            raise
        return self._answer(prompt)

    def undo(self) -> str | None:
        """Takes back the last thing that the user said, and the answer; returns it."""
        asked = [number for number, turn in enumerate(self.turns) if turn.role == "user"]
        if not asked:
            return None
        text = self.turns[asked[-1]].text
        del self.turns[asked[-1] :]
        return text

    def messages(self) -> list[dict[str, str]]:
        """As OpenAI's API has them."""
        return [{"role": turn.role, "content": turn.text} for turn in self.turns]

    def _prompt(self) -> list[int]:
        """Of as many of the newest turns as leave room for an answer, from a user's on."""
        longest = self.decoder.config.max_seq_len
        room = min(self.max_new_tokens or USUAL_NEW_TOKENS, longest // 2)
        said = self.turns[len(self.system) :]
        starts = [number for number, turn in enumerate(said) if turn.role == "user"]
        for start in starts:
            prompt = self.template.prompt([*self.system, *said[start:]])
            if len(prompt) + (room if start != starts[-1] else 1) <= longest:
                self.forgotten = start
                return prompt
        raise UserError(
            f"what you say takes {len(prompt)} tokens{' with the system prompt' if self.system else ''}, and the model "
            f"has max_seq_len={longest}, its answer included; say it in fewer words"
        )

    def _answer(self, prompt: Sequence[int]) -> Iterator[str]:
        left = self.decoder.config.max_seq_len - len(prompt)
        new = min(self.max_new_tokens or left, left)
        # Whoever asks again wants another answer.
        sampling = replace(self.sampling, seed=self.sampling.seed + self._answers)
        self._answers += 1
        written, tokens = "", list[int]()

        def kept() -> Iterator[int]:
            for token in generate_tokens(self.decoder, list(prompt), new, sampling):
                tokens.append(token)
                yield token

        try:
            for text in stream_text(self.tokenizer, kept(), prompt[-CONTEXT_TOKENS:]):
                written += text
                yield text
        finally:
            self.cut = not tokens or tokens[-1] not in self.tokenizer.stop_ids
            self.turns.append(Turn("assistant", written.strip()))
