"""The nodes that Slurm has given to the job that this process is part of."""

import os
import subprocess
from dataclasses import dataclass
from typing import Self

from moray import UserError


@dataclass(frozen=True)
class Allocation:
    """The job's id, and the names of its nodes: the first is the one on which its batch script runs."""

    job: str
    nodes: tuple[str, ...]

    @classmethod
    def own(cls) -> Self:
        """Raises UserError where this process is in no job, or cannot ask Slurm for the nodes' names."""
        try:
            job, nodes = os.environ["SLURM_JOB_ID"], os.environ["SLURM_JOB_NODELIST"]
        except KeyError as error:
            raise UserError(
                f"this process is in no job of Slurm ({error.args[0]} is not set); submit one with "
                "`moray submit --to slurm`, or start it within sbatch, salloc or srun"
            ) from None
        command = ["scontrol", "show", "hostnames", nodes]
        try:
            names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"`{' '.join(command)}` failed: {error}; Slurm's commands are needed within a job"
            ) from None
        return cls(job, tuple(names))
