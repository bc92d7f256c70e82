"""A Ray of one's own, on this machine and for as long as one driver lives.

It runs under a keeper: a process in a session of its own that ends Ray once the driver is gone, however it went, and
itself once Ray is broken. Started by the driver itself, Ray would be hit by every signal that a terminal sends to the
driver's process group before the workers could commit, and a killed driver would leave two of Ray's processes for a
minute (as of Ray 2.60 they wait that long to report their death). A scheduler sends SIGTERM to every process: the
keeper blocks it, and so does all that it starts.
"""

import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._raylet import Config  # type: ignore[attr-defined]

from moray import UserError
from moray.cluster.worker import WorkerError

MAX_WORKERS_PER_CORE = 8
OBJECT_STORE_BYTES = 100 * 2**20  # hardly used: workers exchange tensors through torch.distributed
ANNOUNCEMENT = "Ray is at "
MARK = "MORAY_LOCAL_RAY"
LOOK_EVERY_S = 0.1
KILL_S = 10.0
STARTS = 2
TOO_SLOW = "timed out during startup"  # Ray's own words: parts of a node have 15 s to start, however busy a machine is
# What Ray adds to its temporary folder for the longest of its sockets, and the longest that the kernel takes.
LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
MAX_SOCKET_BYTES = 107 if sys.platform == "linux" else 103
DEFAULT_TEMP_DIR = "/tmp/ray"  # Ray's own on every machine, unless TMPDIR or its user names another


def slots_for(workers: int) -> int:
    """The CPU slots of a local Ray for so many workers: at least the cores; more where workers share them.

    Raises UserError where this machine is far too small.
    """
    cores = os.cpu_count() or 1
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
            [sys.executable, "-m", "moray.cluster.ray.local_ray", str(slots)],
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
            return f"its keeper {_end(self._keeper.returncode)}"
        self._words.seek(0)
        return next((line.strip() for line in reversed(self._words.readlines()) if line.strip()), "without a word")


def end_all(session: int, mark: str) -> None:
    """Kills all processes but this one that the keeper or any below it started, and waits until they are gone.

    Ray's own are in the keeper's session, and their environment may not be readable: they write their title over it.
    Agents have sessions of their own, and MARK=mark in their environment, as have their workers. Ray's own stop goes
    by SIGTERM, which all of them block.
    """
    deadline = time.monotonic() + KILL_S
    while (found := _find(session, mark)) and time.monotonic() < deadline:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(LOOK_EVERY_S)


def _find(session: int, mark: str) -> list[int]:
    entry, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with suppress(OSError):  # one that has gone meanwhile, or is another user's
            # One that has ended and waits to be collected has no environment any more.
            environment = (folder / "environ").read_bytes()
            is_ours = os.getsid(pid) == session or entry in environment.split(b"\0")
            if environment and is_ours and pid != os.getpid():
                found.append(pid)
    return found


def temp_dir() -> str:
    """Where Ray may put its files: its own choice, but where its sockets' names would be too long there."""
    chosen = get_default_ray_temp_dir()
    fits = len(os.fsencode(chosen + LONGEST_SOCKET)) <= MAX_SOCKET_BYTES
    return chosen if fits else DEFAULT_TEMP_DIR


def _share_token() -> None:
    """Has keeper and driver protect their Ray with one token: without it, any user of this machine could run code."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray read the mode when it was imported; this is how it changes its own mind (authentication_token_setup.py).
    Config.initialize("")


def _end(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def main() -> None:
    """The keeper: starts Ray, and ends it when its standard input does."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        ray.init(
            address="local",
            num_cpus=int(sys.argv[1]),
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=temp_dir(),
        )
        print(f"{ANNOUNCEMENT}{ray.get_runtime_context().gcs_address}", flush=True)
        trouble = _keep()
    except Exception as error:
        trouble = " ".join(f"{type(error).__name__}: {error}".split())
    if sys.platform != "linux":
        ray.shutdown()  # it takes its time, but no /proc tells which processes are Ray's
    end_all(os.getpid(), os.environ[MARK])
    if trouble:
        print(trouble, file=sys.stderr, flush=True)
    os._exit(1 if trouble else 0)  # on an ordinary way out, Ray would wait for processes that are gone


def _keep() -> str | None:
    """Waits for the driver's end, or for that of a process without which Ray is none: that it tells."""
    node: Any = ray._private.worker._global_node
    while not select.select([sys.stdin], [], [], LOOK_EVERY_S)[0]:
        for name, process in node.dead_processes():
            if name in ("raylet", "gcs_server"):
                return f"its {name} {_end(process.returncode)}"
    return None


if __name__ == "__main__":
    main()
