import os
import subprocess
import sys
from pathlib import Path

import pytest

from moray.cluster.host_memory import free_memory

GIB = 2**30


def test_of_this_machine_it_is_some_and_not_more_than_there_is() -> None:
    assert 2**20 < free_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("limit", "used", "free"), [("max", 9 * GIB, 8 * GIB), (4 * GIB, GIB, 3 * GIB)])
def test_a_containers_limit_counts(tmp_path: Path, limit: object, used: int, free: int) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:    {8 * 2**20} kB\nHugePages_Total: 0\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    assert free_memory(tmp_path, tmp_path) == free
    assert free_memory(tmp_path, tmp_path / "no cgroup") == 8 * GIB


FAULTS_OF_TWO = """
import resource, sys
from moray.cluster.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(2):
    bytearray(64 << 20)  # written all over, and freed
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[2] - faults[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_what_is_kept_has_its_pages_the_second_time() -> None:
    """64 MiB are 16,384 pages of 4 KiB (or 32 of 2 MiB, where the system gives such)."""
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS_OF_TWO, word], capture_output=True, check=True).stdout)
        for word in ("kept", "given back")
    )
    assert kept < 10 < given_back
