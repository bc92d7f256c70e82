"""What a pod does before Kubernetes ends it: `python -m moray.jobs.runs.stop RUN` has the run commit."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from moray.jobs.runs.status import read_beat

POLL_S = 0.5
AGENT = b"\0moray.cluster.ray.agent\0"


def stop(run: Path) -> None:
    """Asks the run's driver, where it is a process here, to stop, and returns once it has ended: all is committed then.

    Elsewhere it returns once the run's workers here have ended: after that commit, or because the driver is gone. The
    patience is the caller's.
    """
    beat = read_beat(run)
    if beat is None or not beat.driver.is_alive():
        while _has_workers():
            time.sleep(POLL_S)
        return
    with suppress(ProcessLookupError):
        os.kill(beat.driver.pid, signal.SIGTERM)
    while beat.driver.is_alive():
        time.sleep(POLL_S)


def _has_workers() -> bool:
    """A worker is what an agent has forked: it has the same command line. An agent may outlive its driver."""
    agents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if AGENT in (folder / "cmdline").read_bytes():
                # Field 4 of proc_pid_stat(5): the parent.
                agents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    return any(parent in agents for parent in agents.values())


if __name__ == "__main__":
    stop(Path(sys.argv[1]))
