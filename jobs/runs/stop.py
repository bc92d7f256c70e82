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

    Elsewhere it returns once the driver needs this pod no more, or is gone itself: the agents have ended. The patience
    is the caller's.
    """
    beat = read_beat(run)
    if beat is None or not beat.driver.is_alive():
        while _has_agents():
            time.sleep(POLL_S)
        return
    with suppress(ProcessLookupError):
        os.kill(beat.driver.pid, signal.SIGTERM)
    while beat.driver.is_alive():
        time.sleep(POLL_S)


def _has_agents() -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if AGENT in path.read_bytes():
                return True
    return False


if __name__ == "__main__":
    stop(Path(sys.argv[1]))
