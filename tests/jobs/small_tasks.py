"""Tasks that spawned processes can import."""

import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moray.data.preparation.progress import listen, tick
from moray.data.preparation.tasks import perform


@dataclass(frozen=True)
class Touch:
    out: Path
    size: int = 1

    def run(self, folder: Path) -> dict[str, Any]:
        return {"number": int(self.out.name)}


@dataclass(frozen=True)
class Die(Touch):
    def run(self, folder: Path) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


@dataclass(frozen=True)
class DieTelling(Touch):
    """Killed while it tells how far it is."""

    def run(self, folder: Path) -> dict[str, Any]:
        for _ in range(1000):
            tick(1)
        listen(lambda n_bytes: os.kill(os.getpid(), signal.SIGKILL))
        tick(1)
        return {}


@dataclass(frozen=True)
class Count(Touch):
    """Goes through 100 bytes, and tells."""

    def run(self, folder: Path) -> dict[str, Any]:
        for _ in range(10):
            time.sleep(0.15)
            tick(10)
        return {"number": int(self.out.name)}


@dataclass(frozen=True)
class Race(Touch):
    """Somebody else does it meanwhile."""

    def run(self, folder: Path) -> dict[str, Any]:
        perform(Touch(self.out))
        return {"number": -1}


@dataclass(frozen=True)
class FindsNothing(Touch):
    def run(self, folder: Path) -> dict[str, Any]:
        raise FileNotFoundError(f"{self.out} on {socket.gethostname()}")
