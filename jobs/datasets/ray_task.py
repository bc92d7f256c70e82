"""A task on a node of a Ray: done there only where the node shares the driver's storage and runs the same code."""

import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from moray import UserError
from moray.cluster.versions import difference, versions
from moray.data.preparation.tasks import Done, Task, perform

SEEN_WITHIN_S = 10.0
"""So late may a network file system show what another node has written."""
LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class Home:
    """What a node must have in common with the driver's machine. token: a file that the driver has written."""

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
    token.touch()
    try:
        yield Home(socket.gethostname(), token, versions())
    finally:
        token.unlink(missing_ok=True)


def perform_at(home: Home, task: Task) -> Done:
    """Does a task. Raises whatever it raises, and UserError as `Home.check` does."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # of tokenizers: there are as many tasks as cores
    home.check()
    return perform(task)


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
