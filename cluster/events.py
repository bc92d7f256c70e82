"""An append-only log of what happened to a run: one JSON object a line."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moray.cluster.json_lines import JsonLines, read_lines

OnEvent = Callable[[str, dict[str, Any]], None]
"""on_event(kind, fields). Kinds: start, ready, fault, recovered, stop, end; on Ray also unprotected (a Ray that asks
for no token), wait (for slots), device (which kind of them, where a cluster decided it), resize (another number of
workers), leaving (a node told to go), and of a node that is suspect node_set_aside or node_kept."""

OnStatus = Callable[[int, int, dict[str, Any]], None]
"""on_status(rank, step, status): the newest heartbeat of a rank."""

_COUNTS = ("step", "generation", "position")


class EventLog:
    """Appends events to a file such as RUN/events.jsonl; several processes may append to the same one."""

    def __init__(self, path: str | Path) -> None:
        self._lines = JsonLines(Path(path))
        self.path = self._lines.path

    def write(self, kind: str, **fields: Any) -> bool:
        """Appends one event with its time, in unix seconds and ISO 8601 (UTC). `fields` hold JSON-able values.

        False: nobody can read it yet, as the disk is full, or ever, as the folder is gone.
        """
        now = datetime.now(UTC)
        with suppress(FileNotFoundError):
            return self._lines.append({"time": now.timestamp(), "iso": now.isoformat(), "kind": kind, **fields})
        return False


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """The events of a log, oldest first; a line that is none, cut short by a crash or edited, is passed over."""
    return (event for event in read_lines(Path(path)) if is_event(event))


def is_event(row: dict[str, Any]) -> bool:
    """Whether it has a kind, and nothing but whole numbers where it counts."""
    return isinstance(row.get("kind"), str) and all(isinstance(row.get(name, 0), int | None) for name in _COUNTS)
