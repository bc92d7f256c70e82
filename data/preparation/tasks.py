"""Tasks whose result is a folder that is there whole or not at all: a kill costs those under way, and no other."""

import json
import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

LEDGER = "done.json"
PARTIAL = ".partial"


class Task(Protocol):
    """A function of its fields. out: the folder that it makes; size: how much work it is, compared with its like."""

    @property
    def out(self) -> Path: ...

    @property
    def size(self) -> int: ...

    def run(self, folder: Path) -> dict[str, Any]:
        """Fills the folder; returns what is to be known of it, as JSON."""


@dataclass(frozen=True)
class Done:
    """A task that is: its folder, and what it returned."""

    folder: Path
    found: dict[str, Any]


def perform(task: Task) -> Done:
    """Does a task, unless it has been done. Several may do the same one at once: one was taken for dead and was not."""
    if (done := done_before(task)) is not None:
        return done
    partial = task.out.with_name(f"{task.out.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    partial.mkdir(parents=True)
    found = task.run(partial)
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    with open(partial / LEDGER, "w") as file:
        json.dump({"found": found, "sizes": sizes}, file)
        file.flush()
        os.fsync(file.fileno())
    try:
        partial.rename(task.out)
    except OSError:
        if (done := done_before(task)) is None:
            raise
        shutil.rmtree(partial, ignore_errors=True)
        return done
    return Done(task.out, found)


def clear_partials(scratch: Path) -> None:
    """Removes what tasks that were killed have left. One that lives on unknown to us fails, and spoils nothing."""
    for partial in scratch.glob(f"*/*{PARTIAL}"):
        doomed = partial.with_name(f"{partial.name}.removed")
        with suppress(FileNotFoundError):
            partial.rename(doomed)  # first, or one that is finished meanwhile would take the rest for its result
    for doomed in scratch.glob(f"*/*{PARTIAL}.removed"):
        shutil.rmtree(doomed, ignore_errors=True)


def done_before(task: Task) -> Done | None:
    """What the task found, if it is done and its files are as long as they were: a power cut may shorten them."""
    path = task.out / LEDGER
    if not path.exists():
        return None
    try:
        done = json.loads(path.read_text())
        is_whole = all((task.out / name).stat().st_size == size for name, size in done["sizes"].items())
    except (OSError, ValueError, KeyError):
        is_whole = False
    if is_whole:
        return Done(task.out, done["found"])
    doomed = task.out.with_name(f"{task.out.name}.{secrets.token_hex(4)}{PARTIAL}.removed")
    with suppress(FileNotFoundError):
        task.out.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    return None
