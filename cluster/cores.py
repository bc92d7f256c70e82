"""How many cores are this process's: those it is bound to, no more than its container's quota or its Slurm job has."""

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = CGROUP) -> int:
    """At least one. `cgroup`: where a container finds its own limits, of version 2 or 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    of_job = int(os.environ.get("SLURM_CPUS_ON_NODE", allowed))  # Slurm need not bind what it counts
    return max(1, math.ceil(min(allowed, of_job, _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """Cores' worth of time that the processes of this container may take together."""
    with suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return int(quota) / int(period)  # ValueError: "max"
    with suppress(OSError, ValueError):
        quota_us, period_us = (int((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota_us / period_us if quota_us > 0 else math.inf
    return math.inf
