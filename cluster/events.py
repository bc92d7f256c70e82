"""An append-only log of what happened to a run: one JSON object a line."""

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

OnEvent = Callable[[str, dict[str, Any]], None]
"""on_event(kind, fields). Kinds: start, ready, fault, recovered, stop, end; on Ray also unprotected (a Ray that asks
for no token), wait (for slots), and device (which kind of them, where a cluster decided it)."""

OnStatus = Callable[[int, int, dict[str, Any]], None]
"""on_status(rank, step, status): the newest heartbeat of a rank."""


class EventLog:
    """Appends events to a file such as RUN/events.jsonl; several processes may append to the same one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, kind: str, **fields: Any) -> None:
        """Appends one event with its time, in unix seconds and ISO 8601 (UTC). `fields` hold JSON-able values."""
        now = datetime.now(UTC)
        event = {"time": now.timestamp(), "iso": now.isoformat(), "kind": kind, **fields}
        line = json.dumps(event, ensure_ascii=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            # A crash may have left half a line: closing it keeps this event on a line of its own.
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            # One write to a file opened for appending is not interleaved with another process's.
            os.write(descriptor, line)
        finally:
            os.close(descriptor)


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """The events of a log, oldest first; a line that a crash cut short is passed over."""
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(event, dict):
                yield event
