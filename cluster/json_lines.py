"""Files of JSON lines, as RUN/events.jsonl is one: appended to by several processes, and never spoilt for a reader."""

import errno
import json
import os
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class JsonLines:
    """Appends JSON objects to a file, one a line; what a full disk has no room for waits, and goes before the next.

    The folder is made here, and not again: where it is gone, so is all that stood before. Threads may share one.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._waiting: deque[bytes] = deque()
        self._lock = threading.Lock()

    def append(self, row: dict[str, Any]) -> bool:
        """A reader sees the line at once, whole; or, as False says, it waits.

        Raises FileNotFoundError where the folder is gone, ValueError for a row with a NaN.
        """
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self._lock:
            self._waiting.append(line)
            try:
                self._write(to_disk=False)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
            return not self._waiting

    def flush_to_disk(self) -> None:
        """All lines are there even if the machine loses power. Raises OSError while the disk has no room for them."""
        with self._lock:
            self._write(to_disk=True)

    def _write(self, *, to_disk: bool) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while self._waiting:
                line = self._waiting[0]
                # A crash or a full disk may have left half a line: closing it keeps this one on a line of its own.
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    line = b"\n" + line
                # One write to a file opened for appending is not interleaved with another process's.
                if os.write(descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                self._waiting.popleft()
            if to_disk:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_lines(path: Path, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects in a file, in order; a line that is none, cut short or edited, is passed over.

    `last_bytes`: only those that lie whole within so many bytes of its end.
    """
    with open(path, "rb") as lines:
        if last_bytes is not None and os.fstat(lines.fileno()).st_size > last_bytes:
            lines.seek(-last_bytes - 1, os.SEEK_END)
            lines.readline()
        for line in lines:
            if (row := parse_line(line)) is not None:
                yield row


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on a line, None where there is none. A byte that is not UTF-8 costs a character."""
    try:
        row = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
