"""A task on a node of a Ray: done there only where the node shares the driver's storage and runs the same code.

How far it is, it says by the name of a file on that storage, `ID.BYTES`: whoever looks reads one folder, and who is
killed holds up nobody.
"""

import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from moray import UserError
from moray.cluster.versions import difference, versions
from moray.data.preparation.progress import listen
from moray.data.preparation.tasks import Done, Task, perform

SEEN_WITHIN_S = 10.0
"""So late may a network file system show what another node has written."""
LOOK_EVERY_S = 0.1
TELL_EVERY_S = 1.0


@dataclass(frozen=True)
class Home:
    """What a node must have in common with the driver's machine. token: a folder that the driver has made."""

    host: str
    token: Path
    versions: Mapping[str, str]

    def check(self) -> None:
        """Raises UserError, naming this node, where it is not as the driver's machine is."""
        here = socket.gethostname()
        if unlike := difference(self.versions, _versions_here()):
            name, theirs, ours = unlike
            raise UserError(f"on {here}: {name} is {ours}, but {theirs} on {self.host}; install the same on both")
        if not _is_seen(self.token):
            raise UserError(
                f"on {here}: the folder {self.token.parent} is not the one that {self.host} works in; with --engine "
                "ray, --out must lie on storage that all nodes share"
            )


@contextmanager
def home_in(folder: Path) -> Iterator[Home]:
    """Of this process, for as long as the block takes."""
    token = folder / f"seen-{secrets.token_hex(8)}"
    token.mkdir()
    try:
        yield Home(socket.gethostname(), token, versions())
    finally:
        shutil.rmtree(token, ignore_errors=True)


def perform_at(home: Home, task: Task) -> Done:
    """Does a task. Raises whatever it raises, and UserError as `Home.check` does."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # of tokenizers: there are as many tasks as cores
    home.check()
    with telling(home.token):
        return perform(task)


@contextmanager
def telling(folder: Path) -> Iterator[None]:
    """Tells in the folder what this process goes through while the block lasts."""
    name, total, told_at = secrets.token_hex(8), 0, time.monotonic()
    file = folder / f"{name}.0"

    def tell(n_bytes: int) -> None:
        nonlocal file, total, told_at
        total += n_bytes
        if time.monotonic() - told_at >= TELL_EVERY_S:
            told_at = time.monotonic()
            with suppress(OSError):  # the driver is gone, or the storage slow: the task itself will hear of it
                file = file.rename(folder / f"{name}.{total}")

    with suppress(OSError):
        file.touch()
    stop = listen(tell)
    try:
        yield
    finally:
        stop()
        with suppress(OSError):
            file.unlink()


def heard(folder: Path, before: dict[str, int]) -> int:
    """How many bytes more tasks have gone through than `before` says, which knows it then."""
    told = {name: int(total) for name, _, total in (file.partition(".") for file in os.listdir(folder))}
    more = sum(max(total - before.get(name, 0), 0) for name, total in told.items())
    before.update(told)
    return more


@lru_cache(1)
def _versions_here() -> Mapping[str, str]:
    return versions()


@lru_cache(1)
def _is_seen(token: Path) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not token.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_EVERY_S)
    return True
