"""A process, named so that another one can find out whether it is still there."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Process:
    """`kernel` tells machines (and containers, where a pid means another process) apart that share a name.

    `started` is in clock ticks since the boot: a pid is given again, but not at the same time. Both are None where
    there is no /proc.
    """

    host: str
    pid: int
    kernel: str | None
    started: int | None

    @classmethod
    def this(cls) -> Self:
        return cls(socket.gethostname(), os.getpid(), _kernel(), _started(os.getpid()))

    def is_alive(self) -> bool | None:
        """None where that cannot be told from here: it runs, or ran, under another kernel."""
        if self.kernel is None or self.kernel != _kernel():
            return None
        return _started(self.pid) == self.started


def _kernel() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc_pid_stat(5)); None where the process is gone, or ended and not yet collected."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(fields[18])
