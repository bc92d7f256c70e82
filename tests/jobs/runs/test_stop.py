"""What a pod's hook does before the pod ends."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny

from moray.jobs.runs.status import status_of
from moray.jobs.runs.stop import stop

# An agent by its name, and a worker that ends by itself before it; the processes are those of a pod.
POD = """
import subprocess, sys
from pathlib import Path
folder = Path(sys.argv[1])
life = "import os, time; os.fork() and time.sleep(100); time.sleep(2); open(%r, 'w')" % str(folder / "worker-has-ended")
agent = subprocess.Popen([sys.executable, "-c", life, "-m", "moray.cluster.ray.agent", "7"])
subprocess.run([sys.executable, "-m", "moray.jobs.runs.stop", str(folder)], check=True)
assert agent.poll() is None
"""


def test_with_the_driver_it_returns_when_the_run_has_committed(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = tiny(dataset, run, train__steps=100_000, train__eval_every=0, checkpoint__every=100_000)
    with subprocess.Popen([sys.executable, "-m", "moray", "pretrain", *words], stderr=subprocess.DEVNULL) as driver:
        while not (run / "metrics.jsonl").exists():
            assert driver.poll() is None
            time.sleep(0.05)
        stop(run)
        status = status_of(run)
        assert (status.state, status.commit_step) == ("stopped", status.step)
        assert driver.wait(30) == 75


def test_without_the_driver_it_returns_when_the_workers_have_ended(tmp_path: Path) -> None:
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces can be made here")
    done = subprocess.run([*inside, sys.executable, "-c", POD, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "worker-has-ended").exists()
