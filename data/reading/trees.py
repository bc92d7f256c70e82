"""OpenAssistant's trees of messages: every answer ends a dialogue, and answers to one message are ranked by people."""

from collections.abc import Iterator, Mapping
from typing import Any

from moray.data.chat.turns import Turn
from moray.data.reading.records import Reason
from moray.data.reading.rules import Rules
from moray.data.reading.turns import ROLES, Unfit, string

UNRANKED = 1 << 30


def is_tree(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("prompt"), dict) and "replies" in record["prompt"]


def dialogues(record: Mapping[str, Any], rules: Rules) -> Iterator[dict[str, Any] | Unfit] | None:
    """Every answer with all that leads to it; of answers to one message all, or one (`rules.answers`)."""
    return _dialogues(record["prompt"], [], rules) if is_tree(record) else None


def _dialogues(node: Mapping[str, Any], path: list[Turn], rules: Rules) -> Iterator[dict[str, Any] | Unfit]:
    turn = _turn(node)
    if isinstance(turn, Unfit):
        yield turn
        return
    path = [*path, turn]
    if turn.role == "assistant":
        yield {"turns": path}
    replies = node.get("replies") or []
    chosen = False  # what cannot be used is no answer, so that the next one is the best, or the first
    for reply in sorted(replies, key=_rank) if rules.answers == "best" else replies:
        is_answer = turn.role == "user" and not isinstance(_turn(reply), Unfit)
        if not (is_answer and chosen and rules.answers != "all"):
            yield from _dialogues(reply, path, rules)
        chosen |= is_answer


def ranked_pairs(record: Mapping[str, Any], rules: Rules) -> Iterator[dict[str, Any] | Unfit] | None:
    """Each two answers to one message of which people ranked one higher."""
    return _pairs(record["prompt"], []) if is_tree(record) else None


def _pairs(node: Mapping[str, Any], path: list[Turn]) -> Iterator[dict[str, Any] | Unfit]:
    turn = _turn(node)
    if isinstance(turn, Unfit):
        yield turn
        return
    path, replies = [*path, turn], node.get("replies") or []
    if turn.role == "user":
        ranked = [(_rank(reply), said) for reply in replies if not isinstance(said := _turn(reply), Unfit)]
        for rank, better in ranked:
            for other, worse in ranked:
                if rank < other < UNRANKED:
                    yield {"turns": path, "chosen": [better], "rejected": [worse]}
    for reply in replies:
        yield from _pairs(reply, path)


def _turn(node: Mapping[str, Any]) -> Turn | Unfit:
    """Its message, or why it and all below it are left out."""
    if not isinstance(node, dict) or not isinstance(node.get("replies", []), list | None):
        return Unfit(Reason.BAD, "a message of a tree must be an object, and its replies a list")
    role, text = ROLES.get(str(node.get("role"))), string(node, "text")
    if role not in ("user", "assistant"):
        return Unfit(Reason.BAD, f"a message's role {node.get('role')!r} must be prompter or assistant")
    if node.get("deleted") or node.get("review_result") is False:
        return Unfit(Reason.REFUSED, "deleted, or failed its review")
    return Turn(role, text) if text.strip() else Unfit(Reason.EMPTY, "a message is empty")  # type: ignore[arg-type]


def _rank(node: Any) -> int:
    rank = node.get("rank") if isinstance(node, dict) else None
    return rank if isinstance(rank, int) else UNRANKED
