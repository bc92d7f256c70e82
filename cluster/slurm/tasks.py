"""One worker among the tasks that srun started: a rank without Ray and without torchrun."""

import os
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from moray import UserError
from moray.cluster.exit_codes import EXIT_DONE, EXIT_INTERRUPTED
from moray.cluster.group import Group, Hooks
from moray.cluster.ranks import Place, run_rank
from moray.cluster.signals import hold_sigterm, leave_on_sigterm
from moray.cluster.slurm.allocation import Allocation
from moray.cluster.worker import WorkerFunction

# Below those that kernels give to whoever asks for any (32768 on Linux).
FIRST_PORT, N_PORTS = 12000, 20000
LOOK_EVERY_S = 0.2


def run_task(function: WorkerFunction, argument: Any, group: Group, hooks: Hooks) -> int:
    """Runs the function as the rank of this task.

    The ranks meet at a store on the first node. Raises UserError where srun did not start this process, or started
    another number of tasks than there are to be workers.
    """
    if "SLURM_STEP_ID" not in os.environ or "SLURM_PROCID" not in os.environ:
        raise UserError(
            "cluster.launcher=slurm needs tasks that srun started: srun --ntasks N python -m moray …; "
            "or `moray submit --to slurm`; or choose ray or local"
        )
    place = place_of(os.environ, Allocation.own().nodes[0])
    if place.world_size != group.workers:
        raise UserError(
            f"cluster.workers={group.workers} must be the number of srun's tasks, which is {place.world_size}"
        )
    torch.set_num_threads(int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))
    port = port_of(os.environ["SLURM_JOB_ID"], os.environ["SLURM_STEP_ID"])

    def open_store() -> dist.Store:
        if place.rank:
            _wait_for_rank_0(place.host, port, group.startup_timeout_s)
            return dist.TCPStore(place.host, port, place.world_size, wait_for_workers=False)
        try:
            return dist.TCPStore(place.host, port, place.world_size, is_master=True, wait_for_workers=False)
        except dist.DistNetworkError as error:
            taken = f"port {port}, which follows from the job's id, cannot be used on {place.host}"
            raise UserError(f"{taken}: {str(error).splitlines()[0]}; submit the job again") from None

    if signal.SIGTERM in signal.sigpending():
        return EXIT_INTERRUPTED  # held since this process began: the ranks have not met yet
    return run_rank(function, argument, place, open_store, group.device, hooks)


def _wait_for_rank_0(host: str, port: int, patience_s: float) -> None:
    """Which may never come: it alone finds some mistakes. Until then SIGTERM ends this task, and rank 0's code stands.

    srun ends with the highest code of its tasks.
    """
    leave_on_sigterm(EXIT_DONE)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), LOOK_EVERY_S).close()
            break
        except OSError:
            time.sleep(LOOK_EVERY_S)
    hold_sigterm()


def place_of(environment: Mapping[str, str], host: str) -> Place:
    """This task's place among those of its step, as srun's environment tells it."""
    counts = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    return Place(
        rank=int(environment["SLURM_PROCID"]),
        world_size=sum(counts),
        local_rank=int(environment["SLURM_LOCALID"]),
        local_world_size=counts[int(environment["SLURM_NODEID"])],
        host=host,
    )


def tasks_per_node(counts: str) -> list[int]:
    """Slurm's "4(x2),1" is [4, 4, 1]."""
    found = []
    for entry in counts.split(","):
        count, _, times = entry.partition("(x")
        found += [int(count)] * int(times.rstrip(")") or 1)
    return found


def port_of(job: str, step: str) -> int:
    """Where the ranks of a step meet: jobs that share a node have neighbouring ids, and so different ports."""
    return FIRST_PORT + (int(job) * 7 + int(step)) % N_PORTS
