"""A Ray of one's own, on this machine and for as long as one driver lives.

It runs under a keeper: a process in a session of its own that stops Ray in good order once the driver is gone, however
it went. Started by the driver itself, Ray would be hit by every signal that a terminal or a scheduler sends to the
driver's process group before the workers could commit, and a killed driver would leave two of Ray's processes for a
minute (as of Ray 2.60 they wait that long to report their death).
"""

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from moray import UserError
from ray._raylet import Config  # type: ignore[attr-defined]

MAX_WORKERS_PER_CORE = 8
OBJECT_STORE_BYTES = 100 * 2**20  # hardly used: workers exchange tensors through torch.distributed
ANNOUNCEMENT = "Ray is at "


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


@contextmanager
def local_ray(slots: int) -> Iterator[str]:
    """Starts a Ray with so many CPU slots, and stops it at the end; yields its address.

    Raises RuntimeError with Ray's last words where it does not start.
    """
    _share_token()
    with tempfile.TemporaryFile("w+") as words:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "moray.cluster.ray.local_ray", str(slots)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                # Ray's own 15 would let whatever else runs on this machine starve the training.
                "RAY_worker_niceness": "0",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            start_new_session=True,
        )
        try:
            assert keeper.stdout
            address = next((line for line in keeper.stdout if line.startswith(ANNOUNCEMENT)), None)
            if address is None:
                words.seek(0)
                raise RuntimeError(f"a local Ray did not start:\n{words.read()[-2000:]}")
            yield address.removeprefix(ANNOUNCEMENT).strip()
        finally:
            keeper.communicate()  # closes its standard input, which ends it


def _share_token() -> None:
    """Has keeper and driver protect their Ray with one token: without it, any user of this machine could run code."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray read the mode when it was imported; this is how it changes its own mind (authentication_token_setup.py).
    Config.initialize("")


def main() -> None:
    ray.init(
        address="local",
        num_cpus=int(sys.argv[1]),
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=OBJECT_STORE_BYTES,
    )
    print(f"{ANNOUNCEMENT}{ray.get_runtime_context().gcs_address}", flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main()
