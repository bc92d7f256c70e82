"""How much memory this machine still has for us, and what becomes of what we free."""

import ctypes
from contextlib import suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def free_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken without swapping, and within the limit of a container (cgroup v2), if there is one."""
    free = _meminfo(proc)["MemAvailable"]
    with suppress(FileNotFoundError, ValueError):  # "max": no limit
        free = min(free, int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text()))
    return free


def keep_freed_memory() -> None:
    """Has the C library hand out again what this process frees, and not give it back to the system (glibc).

    A step frees what the one before it had allocated: gigabytes, whose pages would be faulted in anew each time.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def _meminfo(proc: Path) -> dict[str, int]:
    lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
    return {name.rstrip(":"): int(size) * 1024 for name, size, *_ in lines}
