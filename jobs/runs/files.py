"""Files that some write while others read them: replaced as a whole, or followed as they grow. Needs no torch."""

import os
from pathlib import Path
from typing import Any

from moray.cluster.json_lines import parse_line

PIECE_BYTES = 4 << 20


def replace_file(path: Path, text: str) -> None:
    """The file holds the old text or the new one, whatever happens on the way. Raises OSError."""
    partial = partial_path(path)
    try:
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_path(path: Path) -> Path:
    """Where this process makes what `path` shall hold."""
    return path.with_name(f"{path.stem}.{os.getpid()}.partial")


class Tail:
    """Reads what is appended to a file of JSON objects, a whole line at a time: from `offset` bytes on, or from now."""

    def __init__(self, path: Path, offset: int | None = None) -> None:
        self._path = path
        size = path.stat().st_size if path.exists() else 0
        self.offset = size if offset is None else offset

    def read(self) -> list[dict[str, Any]]:
        """The objects since the last call, or as many of them as lie in a few megabytes."""
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self.offset:
                self.offset = 0  # somebody removed the file, and it was begun anew
            file.seek(self.offset)
            whole, end, _ = file.read(PIECE_BYTES).rpartition(b"\n")
        self.offset += len(whole + end)
        found = (parse_line(line) for line in whole.splitlines())
        return [entry for entry in found if entry is not None]
