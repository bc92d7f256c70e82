"""What went wrong in a run and what it cost, out of its events: rows of a table, and marks on the curves."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from moray.jobs.runs.words import describe

TOLD_ELSEWHERE = ("begin", "resume", "recovered", "stop", "wait", "unprotected", "device", "no_snapshots")

UNTOLD = "all processes had ended, nobody was left to tell why, and were started again"


@dataclass
class Mishap:
    """A fault, or another event that a person wants to know of.

    step: the last one before the fault. resumed: that from which it went on, `lost` steps earlier. seconds: until all
    workers were at work again. What is not known, or does not come to pass, is None.
    """

    when: str
    what: str
    where: str = ""
    step: int | None = None
    is_fault: bool = False
    resumed: int | None = None
    lost: int | None = None
    seconds: float | None = None


def mishaps(events: Iterable[Mapping[str, Any]], undone: Mapping[int, tuple[int, int]]) -> list[Mishap]:
    """Oldest first. undone: by generation, the first and last step that it computed again (`Record.undone`)."""
    found: list[Mishap] = []
    opened: Mishap | None = None  # a fault after which not all workers are at work yet
    is_at_work = False
    for event in events:
        kind, step = event["kind"], event.get("step")
        if kind == "fault":
            opened = Mishap(_when(event), str(event.get("reason")), _where(event), step, is_fault=True)
            found.append(opened)
        elif kind == "start" and is_at_work:
            opened = Mishap(_when(event), UNTOLD, is_fault=True)
            found.append(opened)
        elif kind in ("begin", "resume") and opened:
            opened.resumed = step
            if again := undone.get(event.get("generation", 0)):
                opened.step, opened.lost = again[1], again[1] - again[0] + 1
            else:
                opened.step, opened.lost = opened.step if opened.step is not None else step, 0
        elif kind == "recovered" and opened:
            opened.seconds = event.get("seconds")
        elif kind not in TOLD_ELSEWHERE and (line := _line(event)):
            found.append(Mishap(_when(event), line, str(event.get("node") or ""), step))
        if kind in ("ready", "recovered"):
            opened = None
        if kind in ("start", "fault", "stop", "end", "resize", "leaving"):
            is_at_work = kind == "start"
    return found


def _line(event: Mapping[str, Any]) -> str | None:
    try:
        return describe(event["kind"], dict(event))
    except (KeyError, TypeError, ValueError, AttributeError):  # an edited event
        return event["kind"]


def _when(event: Mapping[str, Any]) -> str:
    try:
        return datetime.fromtimestamp(event["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return "?"


def _where(event: Mapping[str, Any]) -> str:
    rank, node = event.get("rank"), event.get("node")
    return ", ".join([*([f"rank {rank}"] if rank is not None else []), *([str(node)] if node else [])])
