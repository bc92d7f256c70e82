"""The cores of a process: by its affinity, truly set, and by a container's quota, as the kernel writes it."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moray.cluster.cores import usable_cores


def test_a_process_that_is_bound_to_one_core_has_one(tmp_path: Path) -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import moray.cluster.cores as c; "
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code + "print(c.usable_cores())"]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "1\n"
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
    ],
)
def test_a_container_has_what_its_quota_leaves(tmp_path: Path, files: dict[str, str], cores: float) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == min(cores, len(os.sched_getaffinity(0)))


def test_a_job_of_slurm_has_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = usable_cores()
    for given, used in (("1", 1), ("100000", cores)):
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", given)
        assert usable_cores() == used
