"""The launchers by name, and where one says which worker a process is. Needs no torch."""

import os
from typing import Literal

Launcher = Literal["ray", "torchrun", "slurm", "local"]
RANK_VARIABLES: dict[Launcher, str] = {"torchrun": "RANK", "slurm": "SLURM_PROCID"}
"""Under these every worker is a process of the same command, and this tells its rank."""


def own_rank(launcher: Launcher) -> int | None:
    """This process's rank where another program has started one for each; None: it is the driver of its workers."""
    variable = RANK_VARIABLES.get(launcher)
    return int(os.environ.get(variable, "0")) if variable else None


def is_another_rank() -> bool:
    """Whether this is one of several processes of the same command, and not the first, whatever started them."""
    return any(os.environ.get(variable, "0") != "0" for variable in RANK_VARIABLES.values())
