"""One worker among those that torchrun started; torchrun watches and restarts them."""

import os
from typing import Any

import torch.distributed as dist

from cluster.devices import check_health, pick_device
from cluster.events import OnEvent, OnStatus
from cluster.local import run_here
from cluster.signals import stop_on_signals
from cluster.worker import WorkerContext, WorkerFunction


def _open_store() -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://"))
    return store


def run_torchrun(function: WorkerFunction, argument: Any, on_event: OnEvent, on_status: OnStatus) -> int:
    """Runs the function as the rank that torchrun's environment names; only rank 0 tells of events and progress.

    Raises ValueError where this process was not started by torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ValueError(
            "cluster.launcher=torchrun needs processes that torchrun started: "
            "torchrun --nproc-per-node N -m jobs …; or choose ray or local"
        )
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = pick_device(local_rank)
    check_health(device)
    # A terminal's Ctrl-C reaches every process of torchrun, which then repeats it: it must not cut a commit off.
    # torchrun itself kills what outlives its patience.
    with stop_on_signals(impatient=False) as should_stop:
        context = WorkerContext(
            rank=rank,
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=local_rank,
            local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            generation=int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1,
            device=device,
            open_store=_open_store,
            report=lambda step, status: on_status(rank, step, status) if rank == 0 else None,
            should_stop=should_stop,
        )
        return run_here(function, argument, context, on_event if rank == 0 else lambda kind, fields: None)
