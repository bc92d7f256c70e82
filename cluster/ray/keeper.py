"""The keeper of a Ray of one driver's own: a process on each of its nodes that starts Ray there, and ends it.

It ends Ray once the driver is gone, however it went, and itself once Ray is broken. Started by the driver itself, Ray
would be hit by every signal that a terminal sends to the driver's process group before the workers could commit, and a
killed driver would leave two of Ray's processes for a minute (as of Ray 2.60 they wait that long to report their
death). A scheduler sends SIGTERM to every process: the keeper blocks it, and so does all that it starts. It is in a
session of its own.

The head's keeper says on standard output where Ray is, and each of them what becomes of its part. From standard input
each takes the head's address, which the driver passes on to all, and then waits for its end. It imports Ray and nothing
else that takes time: the driver waits for it.
"""

import os
import select
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray._common.utils import get_default_ray_temp_dir
from ray._private.node import Node
from ray._private.parameter import RayParams

from moray.cluster.ray.part import Part

OBJECT_STORE_BYTES = 100 * 2**20  # hardly used: workers exchange tensors through torch.distributed
ANNOUNCEMENT = "Ray is at "
MARK = "MORAY_OWN_RAY"
MARK_TO_BE = "MORAY_OWN_RAY_TO_BE"  # what starts keepers, as srun, does not bear the mark itself: it outlives them
LOOK_EVERY_S = 0.1
KILL_S = 10.0
# What Ray adds to its temporary folder for the longest of its sockets, and the longest that the kernel takes.
LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
MAX_SOCKET_BYTES = 107 if sys.platform == "linux" else 103
DEFAULT_TEMP_DIR = "/tmp/ray"  # Ray's own on every machine, unless TMPDIR or its user names another


def main() -> None:
    """Starts Ray, and ends it when standard input does."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    part, node = Part.of(sys.argv[1]), None
    os.environ[MARK] = os.environ.pop(MARK_TO_BE)
    try:
        node = _start_head(part) if part.is_head else _join(part)
        trouble = _keep(node) if node else None
    except Exception as error:
        trouble = " ".join(f"{type(error).__name__}: {error}".split())
    if trouble:
        with suppress(BrokenPipeError):
            print(trouble, flush=True)
    if sys.platform != "linux" and node:
        node.kill_all_processes(check_alive=False)  # no /proc tells which processes are Ray's
    end_all(os.getpid(), os.environ[MARK])
    if part.temp_dir and not trouble:
        shutil.rmtree(part.temp_dir, ignore_errors=True)
    os._exit(1 if trouble else 0)  # on an ordinary way out, Ray would wait for processes that are gone


def _start_head(part: Part) -> Node:
    node = _node(part, include_dashboard=False, include_log_monitor=False, no_monitor=True)
    print(f"{ANNOUNCEMENT}{node.gcs_address}", flush=True)
    sys.stdin.readline()
    return node


def _join(part: Part) -> Node | None:
    """None where the driver has gone before it could say where."""
    address = sys.stdin.readline().strip()
    if not address:
        return None
    node = _node(part, gcs_address=address, include_log_monitor=False)
    print(f"{ANNOUNCEMENT}{address}", flush=True)
    return node


def _node(part: Part, **parameters: Any) -> Node:
    """A node without what only others would look at: no dashboard, no autoscaler, no copies of logs, no driver here."""
    return Node(
        RayParams(
            num_cpus=part.slots,
            node_ip_address=part.address,
            object_store_memory=OBJECT_STORE_BYTES,
            temp_dir=part.temp_dir or temp_dir(),
            **parameters,
        ),
        head=part.is_head,
        shutdown_at_exit=False,
        spawn_reaper=False,
    )


def _keep(node: Node) -> str | None:
    """Waits for the driver's end, or for that of a process without which Ray is none: that it tells."""
    while not select.select([sys.stdin], [], [], LOOK_EVERY_S)[0]:
        for name, process in node.dead_processes():
            if name in ("raylet", "gcs_server"):
                return f"its {name} {describe_end(process.returncode)}"
    return None


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
    return chosen if fits_sockets(chosen) else DEFAULT_TEMP_DIR


def fits_sockets(folder: str) -> bool:
    """Whether the names of Ray's sockets are short enough in this temporary folder."""
    return len(os.fsencode(folder + LONGEST_SOCKET)) <= MAX_SOCKET_BYTES


def describe_end(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


if __name__ == "__main__":
    main()
