"""One worker among those that torchrun started; torchrun watches and restarts them."""

import os
from typing import Any

import torch.distributed as dist

from moray import UserError
from moray.cluster.devices import Device
from moray.cluster.group import Hooks
from moray.cluster.ranks import Place, run_rank
from moray.cluster.worker import WorkerFunction


def run_torchrun(function: WorkerFunction, argument: Any, device: Device, hooks: Hooks) -> int:
    """Runs the function as the rank that torchrun's environment names.

    Raises UserError where this process was not started by torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise UserError(
            "cluster.launcher=torchrun needs processes that torchrun started: "
            "torchrun --nproc-per-node N -m moray …; or choose ray or local"
        )
    place = Place(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        host=os.environ["MASTER_ADDR"],
        n_restarts=int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
    )
    return run_rank(function, argument, place, lambda: next(dist.rendezvous("env://"))[0], device, hooks)
