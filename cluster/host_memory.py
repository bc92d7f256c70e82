"""How much memory this machine still has for us."""

from contextlib import suppress
from pathlib import Path


def free_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken without swapping, and within the limit of a container (cgroup v2), if there is one."""
    free = _meminfo(proc)["MemAvailable"]
    with suppress(FileNotFoundError, ValueError):  # "max": no limit
        free = min(free, int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text()))
    return free


def _meminfo(proc: Path) -> dict[str, int]:
    lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
    return {name.rstrip(":"): int(size) * 1024 for name, size, *_ in lines}
