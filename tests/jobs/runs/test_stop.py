"""What a pod's hook does before the pod ends."""

import subprocess
import sys
import time
from pathlib import Path

from tiny import tiny

from moray.jobs.runs.status import status_of
from moray.jobs.runs.stop import stop


def test_it_returns_when_the_run_has_committed(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stop(run)  # where nothing has begun, nothing is waited for
    words = tiny(dataset, run, train__steps=100_000, train__eval_every=0, checkpoint__every=100_000)
    with subprocess.Popen([sys.executable, "-m", "moray", "pretrain", *words], stderr=subprocess.DEVNULL) as driver:
        while not (run / "metrics.jsonl").exists():
            assert driver.poll() is None
            time.sleep(0.05)
        stop(run)
        status = status_of(run)
        assert (status.state, status.commit_step) == ("stopped", status.step)
        assert driver.wait(30) == 75
    stop(run)  # nor where it has ended
