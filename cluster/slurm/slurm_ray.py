"""A Ray of one driver's own on all nodes of its Slurm job."""

import os
import sys
import tempfile

from moray.cluster.ray.keeper import fits_sockets
from moray.cluster.ray.own_ray import OwnRay
from moray.cluster.slurm.allocation import Allocation

SHORT_TEMP_DIR = "/tmp"


class SlurmRay(OwnRay):
    """srun starts a keeper on each node, and passes on what they and the driver have to say to each other.

    Every port is one that was free: nothing else on a node, another such job least of all, is in its way.
    """

    def __init__(self, allocation: Allocation) -> None:
        n_nodes = str(len(allocation.nodes))
        srun = ["srun", "--job-name", "ray", "--nodes", n_nodes, "--ntasks", n_nodes, "--ntasks-per-node", "1"]
        # Workers may use every core of the job; and a Ray that has lost a node is replaced as a whole.
        srun += ["--overlap", "--cpu-bind", "none", "--mpi", "none", "--kill-on-bad-exit=1"]
        if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
            srun += ["--cpus-per-task", cores]  # since Slurm 22.05 srun does not take it from sbatch
        node = [sys.executable, "-m", "moray.cluster.slurm.node", _temp_dir(allocation.job), *allocation.nodes[:2]]
        super().__init__(f"Ray of Slurm job {allocation.job}", [*srun, *node], len(allocation.nodes))


def _temp_dir(job: str) -> str:
    """The same on every node, as Ray wants it; nothing else of this job may be there."""
    chosen = os.path.join(tempfile.gettempdir(), f"moray-{job}")
    return chosen if fits_sockets(chosen) else os.path.join(SHORT_TEMP_DIR, f"moray-{job}")
