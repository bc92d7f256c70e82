"""What rl.rewards says: which rewards judge an answer, and how much each counts.

An entry is NAME=WEIGHT. NAME is a built-in (`exact`, `gsm8k`, `gsm8k:flexible`, `format:REGEX`), `module:function` for
a function of the user's, or `model:RUN` for a reward model. Where a word holds several, they are separated by commas:
`gsm8k=1,format:(?s)<think>.{1,999}</think>.*=0.2,my_rewards:length=-0.1`. A comma separates only behind a weight and
before a name, so expressions may hold commas and equals signs; a list in a recipe has no such limits. A reward of
weight 0 is computed and told, and no more.

A function of the user's judges one answer, and knows nothing else:

    from moray.jobs.alignment.rewards import Sample

    def length(sample: Sample) -> float:
        return len(sample.answer) / 1000

It must be a function of its sample alone, without state, clock or random numbers: then rewards depend neither on which
process computes them nor on what it has judged before, and a step that was killed is done again alike.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moray import UserError, nearest

SETTING = "rl.rewards"
BEGINNING = 200
BUILTINS = ("exact", "gsm8k", "gsm8k:flexible", "format:REGEX")
_WEIGHT = r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?)"
_ENTRY = re.compile(rf"(.+?=\s*{_WEIGHT})\s*(?:,(?=\s*[^\W\d][\w.]*\s*[:=])|\Z)", re.IGNORECASE | re.DOTALL)
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class Sample:
    """An answer to be judged."""

    key: str
    """Of the prompt in its dataset; answers to the same prompt share it."""
    prompt: str
    """The text that the model was given, as its template writes it."""
    answer: str
    """The text that the model wrote, without the token that ended it."""
    reference: Any
    """What the dataset says of right answers, as JSON has it: a text, a number, a list of several, or fields."""
    ended: bool
    """Whether the model ended it; otherwise it was cut at the most tokens that an answer may have."""
    tokens: tuple[int, ...]
    """The answer's token ids, with the one that ended it."""

    @property
    def told(self) -> str:
        """It in a line, for whoever must find it."""
        rest = "…" if len(self.answer) > BEGINNING else ""
        return f"sample {self.key} (its answer: {self.answer[:BEGINNING]!r}{rest})"


@dataclass(frozen=True)
class Reward:
    """An entry of rl.rewards. name: as it was written, the expression or run included; no two are alike."""

    name: str
    weight: float

    def __str__(self) -> str:
        return f"{self.name}={self.weight!r}"

    @property
    def argument(self) -> str:
        """What stands behind the first colon: REGEX, RUN, or the function's name in its module."""
        return self.name.partition(":")[2]

    @property
    def kind(self) -> Literal["builtin", "function", "model"]:
        """Who computes it: of `model`, a reward model; of the others, a `Judge`."""
        head, colon, _ = self.name.partition(":")
        if head in ("exact", "gsm8k", "format") or not colon:
            return "builtin"
        return "model" if head == "model" else "function"


def parse_rewards(value: str | Sequence[str]) -> tuple[Reward, ...]:
    """Of a word with commas, or a list of entries; all is checked that needs no import.

    Raises UserError naming an entry that is none, a built-in that there is not, an expression that is none, a weight
    that is senseless, and a name that is there twice.
    """
    entries = _split(value) if isinstance(value, str) else value
    rewards = tuple(map(_parse, entries))
    if not rewards:
        raise UserError(f"{SETTING} is empty: nothing would judge the answers; as in {SETTING}=exact=1")
    for reward in rewards:
        _check(reward)
    name, times = Counter(reward.name for reward in rewards).most_common(1)[0]
    if times > 1:
        raise UserError(f"{SETTING} has {name} twice; give it the sum of the weights")
    if not any(reward.weight for reward in rewards):
        told = ",".join(map(str, rewards))
        raise UserError(f"{SETTING}={told}: all weights are 0, and nothing would be learnt; one at least must be more")
    return rewards


def _split(word: str) -> list[str]:
    entries, at = [], 0
    while at < len(word):
        found = _ENTRY.match(word, at)
        if not found:
            raise _no_entry(word[at:])
        entries.append(found[1])
        at = found.end()
    return entries


def _parse(entry: str) -> Reward:
    """The weight stands behind the last equals sign."""
    name, _, weight = entry.lstrip().rpartition("=")
    try:
        return Reward(name if name.startswith("format:") else name.strip(), float(weight))
    except ValueError:
        raise _no_entry(entry) from None


def _no_entry(text: str) -> UserError:
    return UserError(
        f"{SETTING}={text} must be NAME=WEIGHT, as in exact=1; of several, with commas, or a list in a recipe"
    )


def _check(reward: Reward) -> None:
    name, weight = reward.name, reward.weight
    if not math.isfinite(weight):
        raise UserError(f"{SETTING}={reward}: the weight must be a finite number, as in {name}=1")
    if reward.kind == "builtin":
        _check_builtin(reward)
    elif reward.kind == "model" and not reward.argument:
        raise UserError(f"{SETTING}={reward} must name the reward model's run, as in model:runs/reward=1")
    elif reward.kind == "function" and not _FUNCTION.fullmatch(name):
        raise UserError(
            f"{SETTING}={reward}: {name} must be module:function, model:RUN or a built-in; "
            f"{nearest(name.partition(':')[0], BUILTINS)}"
        )
    if weight < 0 and name.partition(":")[0] in ("exact", "gsm8k", "model"):
        raise UserError(f"{SETTING}={reward}: a negative weight would reward what is wrong; it must be at least 0")


def _check_builtin(reward: Reward) -> None:
    if reward.name in ("exact", "gsm8k", "gsm8k:flexible"):
        return
    if reward.name.partition(":")[0] != "format":
        raise UserError(
            f"{SETTING}={reward}: there is no built-in {reward.name}, and a function of yours is written "
            f"module:function; {nearest(reward.name, BUILTINS)}"
        )
    if not reward.argument:
        raise UserError(f"{SETTING}={reward} must say the expression that answers match, as in format:[0-9]+=1")
    try:
        re.compile(reward.argument)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{SETTING}={reward}: {reward.argument} is no regular expression: {error}") from None
