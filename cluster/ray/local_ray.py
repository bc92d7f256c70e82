"""A Ray of one's own, on this machine and for as long as one driver lives: the driver's end of it (see `keeper.py`)."""

import os
import secrets
import subprocess
import sys
import tempfile

from ray._raylet import Config  # type: ignore[attr-defined]

from moray import UserError
from moray.cluster.cores import usable_cores
from moray.cluster.ray.keeper import ANNOUNCEMENT, MARK, describe_end, end_all
from moray.cluster.worker import WorkerError

MAX_WORKERS_PER_CORE = 8
STARTS = 2
TOO_SLOW = "timed out during startup"  # Ray's own words: parts of a node have 15 s to start, however busy a machine is


def slots_for(workers: int) -> int:
    """The CPU slots of a local Ray for so many workers: at least the cores; more where workers share them.

    Raises UserError where this machine is far too small.
    """
    cores = usable_cores()
    if workers > MAX_WORKERS_PER_CORE * cores:
        raise UserError(
            f"cluster.workers={workers} is too many for a local Ray on {cores} cores; "
            f"choose at most {MAX_WORKERS_PER_CORE * cores}, or set RAY_ADDRESS to a cluster"
        )
    return max(cores, workers)


class LocalRay:
    """The driver's end of a Ray with so many CPU slots: its address, whether it is still there, and its end.

    Raises WorkerError with Ray's last words where it does not start.
    """

    def __init__(self, slots: int) -> None:
        _share_token()
        for _ in range(STARTS):
            self._mark = secrets.token_hex(8)
            self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the rest
            self._keeper = self._start(slots)
            assert self._keeper.stdout
            announcement = next((line for line in self._keeper.stdout if line.startswith(ANNOUNCEMENT)), None)
            if announcement:
                self.address = announcement.removeprefix(ANNOUNCEMENT).strip()
                return
            self._keeper.wait()
            reason = self._last_words()
            self.close()
            if TOO_SLOW not in reason:
                break
        raise WorkerError(f"a local Ray did not start: {reason}")

    def _start(self, slots: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "moray.cluster.ray.keeper", str(slots)],
            env={
                **os.environ,
                MARK: self._mark,
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                # Ray's own 15 would let whatever else runs on this machine starve the training.
                "RAY_worker_niceness": "0",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            start_new_session=True,
        )

    def loss(self) -> str | None:
        """What became of this Ray; None while it is as it should be."""
        if self._keeper.poll() is None:
            return None
        return f"the local Ray was lost: {self._last_words()}"

    def close(self) -> None:
        """Ends this Ray, and all workers in it, now."""
        if self._words.closed:
            return
        assert self._keeper.stdin
        assert self._keeper.stdout
        self._keeper.stdin.close()
        self._keeper.wait()
        end_all(self._keeper.pid, self._mark)  # where the keeper was killed before it could
        self._keeper.stdout.close()
        self._words.close()

    def _last_words(self) -> str:
        """The keeper's, once it has ended."""
        if self._keeper.returncode < 0:
            return f"its keeper {describe_end(self._keeper.returncode)}"
        self._words.seek(0)
        return next((line.strip() for line in reversed(self._words.readlines()) if line.strip()), "without a word")


def _share_token() -> None:
    """Has keeper and driver protect their Ray with one token: without it, any user of this machine could run code."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray read the mode when it was imported; this is how it changes its own mind (authentication_token_setup.py).
    Config.initialize("")
