"""A Ray of one driver's own, for as long as that lives: the driver's end of it (see `keeper.py`)."""

import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress

from ray._raylet import Config  # type: ignore[attr-defined]

from moray.cluster.ray.keeper import ANNOUNCEMENT, KILL_S, MARK_TO_BE, describe_end, end_all
from moray.cluster.worker import WorkerError

STARTS = 2
TOO_SLOW = "timed out during startup"  # Ray's own words: parts of a node have 15 s to start, however busy a machine is


class OwnRay:
    """A Ray of which `command` starts the keepers, one a node: its address, whether it is still there, and its end.

    `what` is its name. Raises WorkerError with Ray's last words where it does not start.
    """

    def __init__(self, what: str, command: Sequence[str], n_nodes: int = 1) -> None:
        _share_token()
        self._what, self._command = what, command
        for _ in range(STARTS):
            self._mark = secrets.token_hex(8)
            self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the rest
            self._keepers = self._start()
            if (reason := self._meet(n_nodes)) is None:
                return
            self.close()
            if TOO_SLOW not in reason:
                break
        raise WorkerError(f"a {what} did not start: {reason}")

    def _start(self) -> subprocess.Popen[str]:
        # A signal that is blocked here stays so in what is started: what a scheduler sends to all must end none of it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return subprocess.Popen(
                self._command,
                env={
                    **os.environ,
                    MARK_TO_BE: self._mark,
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
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _meet(self, n_nodes: int) -> str | None:
        """Tells all keepers where the head is, as soon as it says so; returns why one of them has no Ray."""
        assert self._keepers.stdin
        assert self._keepers.stdout
        for n_met in range(n_nodes):
            line = self._keepers.stdout.readline()
            if not line.startswith(ANNOUNCEMENT):
                return line.strip() or self._last_words()
            if n_met == 0:
                self.address = line.removeprefix(ANNOUNCEMENT).strip()
                with suppress(BrokenPipeError):
                    print(self.address, file=self._keepers.stdin, flush=True)
        return None

    def loss(self) -> str | None:
        """What became of this Ray; None while it is as it should be."""
        assert self._keepers.stdout
        if not select.select([self._keepers.stdout], [], [], 0)[0]:
            return None
        return f"the {self._what} was lost: {self._keepers.stdout.readline().strip() or self._last_words()}"

    def close(self) -> None:
        """Ends this Ray, and all workers in it, now."""
        if self._words.closed:
            return
        assert self._keepers.stdin
        assert self._keepers.stdout
        with suppress(BrokenPipeError):
            self._keepers.stdin.close()
        try:
            self._keepers.wait(2 * KILL_S)
        except subprocess.TimeoutExpired:  # a node does not answer any more
            self._keepers.kill()
            self._keepers.wait()
        end_all(self._keepers.pid, self._mark)  # where a keeper was killed before it could
        self._keepers.stdout.close()
        self._words.close()

    def _last_words(self) -> str:
        """Those of the command, which has ended or is about to."""
        code = self._keepers.wait()
        if code < 0:
            return f"its keeper {describe_end(code)}"
        self._words.seek(0)
        return next((line.strip() for line in reversed(self._words.readlines()) if line.strip()), "without a word")


def _share_token() -> None:
    """Has keepers and driver protect their Ray with one token: without it, whoever reaches it could run code."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray read the mode when it was imported; this is how it changes its own mind (authentication_token_setup.py).
    Config.initialize("")
