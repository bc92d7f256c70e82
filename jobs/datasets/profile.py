"""What a person needs to judge dialogues by, before a model learns from them."""

import hashlib
from array import array
from collections import Counter

import numpy as np

from moray.data.chat.turns import Rendered
from moray.data.shards import TRAINED

SHOWN, SHOWN_CHARS = 3, 60
MOST_ANSWERS = 200_000  # counted at a time; of more, those that came least often are forgotten
LIMITS = (512, 1024, 2048, 4096)


class Profile:
    """Lengths, shares and repeats of dialogues, gathered as they are written. Memory: 4 bytes a dialogue, and 200,000
    answers.
    """

    def __init__(self) -> None:
        self._lengths = array("I")
        self._n_turns = self._n_trained = 0
        self._answers: Counter[tuple[bytes, str]] = Counter()

    def note(self, rendered: Rendered, answers: list[str], n_turns: int) -> None:
        self._lengths.append(len(rendered.tokens))
        self._n_turns += n_turns
        self._n_trained += int((rendered.flags & TRAINED > 0).sum())
        for answer in answers:
            # A digest tells long ones apart; what is shown is their beginning.
            self._answers[hashlib.blake2b(answer.encode(), digest_size=8).digest(), answer[:SHOWN_CHARS]] += 1
        if len(self._answers) > MOST_ANSWERS:
            self._answers = Counter(dict(self._answers.most_common(MOST_ANSWERS // 2)))

    def lines(self) -> list[str]:
        lengths = np.frombuffer(self._lengths, np.uint32)
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
