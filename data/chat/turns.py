"""Who speaks when in a dialogue, and what a chat template makes of one."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]
_FOLLOWS: dict[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


class Turn(NamedTuple):
    """What somebody said. White space around it does not count."""

    role: Role
    text: str


class Rendered(NamedTuple):
    """A dialogue's tokens, and of each TRAINED (an answer or its end) and USER_TURN."""

    tokens: np.ndarray  # uint16 or uint32
    flags: np.ndarray  # uint8


class ChatTemplate(Protocol):
    """How a model's dialogues are written. jinja: the same for others. turn_end: the token that ends every turn, where
    that is known beforehand.
    """

    jinja: str
    turn_end: int | None

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """What the next answer follows: the turns so far and the beginning of an assistant's.

        Raises UserError for turns that the template cannot write.
        """

    def render(self, dialogues: Iterable[Sequence[Turn]]) -> Iterator[Rendered | str]:
        """Each dialogue, or why it cannot be written."""


def mistake_in(turns: Sequence[Turn]) -> str | None:
    """What is wrong with a dialogue's roles, in words; None: nothing.

    A system's turn first, if any, then a user's; answers follow users and tools, and tools follow answers.
    """
    before = ""
    for number, turn in enumerate(turns, 1):
        if turn.role not in get_args(Role):
            return f"turn {number} is of role {turn.role!r}; the roles are {', '.join(get_args(Role))}"
        if turn.role not in _FOLLOWS[before]:
            behind = f"after {before}" if before else "at the beginning"
            expected = " or ".join(_FOLLOWS[before])
            return f"roles out of order: turn {number} is {turn.role}'s {behind}, where {expected} speaks"
        before = turn.role
    return None
