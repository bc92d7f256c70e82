"""What a person needs to judge dialogues by, before a model learns from them."""

import hashlib
from collections import Counter
from typing import Any

import numpy as np

from moray.data.chat.turns import Rendered
from moray.data.shards import TRAINED

SHOWN, SHOWN_CHARS = 3, 60
MOST_ANSWERS = 200_000  # counted at a time; of more, those that came least often are forgotten
KEPT = 10_000  # that a part of the dialogues tells to the others
LIMITS = (512, 1024, 2048, 4096)


class Profile:
    """Shares and repeats in dialogues, gathered as they are written. Memory: 200,000 answers."""

    def __init__(self) -> None:
        self._n_turns = self._n_trained = 0
        self._answers: Counter[tuple[str, str]] = Counter()

    def note(self, rendered: Rendered, answers: list[str], n_turns: int) -> None:
        self._n_turns += n_turns
        self._n_trained += int((rendered.flags & TRAINED > 0).sum())
        for answer in answers:
            # A digest tells long ones apart; what is shown is their beginning.
            self._answers[hashlib.blake2b(answer.encode(), digest_size=8).hexdigest(), answer[:SHOWN_CHARS]] += 1
        self._forget()

    def _forget(self) -> None:
        if len(self._answers) > MOST_ANSWERS:
            self._answers = Counter(dict(self._answers.most_common(MOST_ANSWERS // 2)))

    def as_json(self) -> list[Any]:
        return [self._n_turns, self._n_trained, [[*key, count] for key, count in self._answers.most_common(KEPT)]]

    def add(self, found: list[Any]) -> None:
        """Counts what `as_json` says of other dialogues."""
        n_turns, n_trained, answers = found
        self._n_turns, self._n_trained = self._n_turns + n_turns, self._n_trained + n_trained
        self._answers.update({(digest, text): count for digest, text, count in answers})
        self._forget()

    def lines(self, lengths: np.ndarray) -> list[str]:
        """What to say of dialogues of so many tokens."""
        total = int(lengths.sum())
        median, most, nearly_all = np.quantile(lengths, (0.5, 0.9, 0.99), method="lower").tolist()
        over = ", ".join(f"{int((lengths > limit).sum()):,} above {limit:,}" for limit in LIMITS)
        lines = [
            f"{'lengths':<10} median {median:,} tokens, 90% {most:,}, 99% {nearly_all:,}, longest {lengths.max():,}",
            f"{'':<10} {over}",
            f"{'turns':<10} {self._n_turns / len(lengths):.1f} a dialogue",
            f"{'trained on':<10} {self._n_trained:,} tokens of answers and their ends, {self._n_trained / total:.1%}",
        ]
        repeated = [(count, text) for (_, text), count in self._answers.most_common(SHOWN) if count > 1]
        for number, (count, text) in enumerate(repeated):
            lines.append(f"{'' if number else 'repeated':<10} {count:,} times {text!r}")
        return lines
