"""What a pod does before Kubernetes ends it: `python -m moray.jobs.runs.stop RUN` has the run commit."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from moray.jobs.runs.status import is_run, read_beat, status_of

POLL_S = 0.5


def stop(run: Path) -> None:
    """Asks the run's driver to stop if it is a process here, and returns once the run has committed and ended.

    The patience is the caller's.
    """
    if not is_run(run):
        return
    beat = read_beat(run)
    if beat and beat.driver.is_alive():
        with suppress(ProcessLookupError):
            os.kill(beat.driver.pid, signal.SIGTERM)
    while status_of(run).state == "running":
        time.sleep(POLL_S)


if __name__ == "__main__":
    stop(Path(sys.argv[1]))
