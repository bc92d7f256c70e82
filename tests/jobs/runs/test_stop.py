"""What a pod's hook does before the pod ends."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny

from moray.jobs.runs.status import status_of
from moray.jobs.runs.stop import stop

# An agent by its name, that ends by itself; the processes are those of a pod.
POD = """
python, run = sys.argv[1:]
agent = subprocess.Popen([python, "-c", "import time; time.sleep(2)", "-m", "moray.cluster.ray.agent", "7"])
subprocess.run([python, "-m", "moray.jobs.runs.stop", run], check=True)
assert agent.poll() == 0
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


def test_without_the_driver_it_returns_when_the_agents_have_ended(tmp_path: Path) -> None:
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces can be made here")
    script = f"import subprocess, sys{POD}"
    for run in (tmp_path / "none", tmp_path):
        done = subprocess.run(
            [*inside, sys.executable, "-c", script, sys.executable, str(run)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
