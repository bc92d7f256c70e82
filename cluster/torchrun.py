"""One worker among those that torchrun started; torchrun watches and restarts them."""

import os
from typing import Any, Literal

import torch.distributed as dist
from moray import UserError
from moray.cluster.devices import Device, check_health, pick_device
from moray.cluster.events import OnEvent, OnStatus
from moray.cluster.local import run_here
from moray.cluster.signals import stop_on_signals
from moray.cluster.worker import WorkerContext, WorkerFunction


def run_torchrun(
    function: WorkerFunction,
    argument: Any,
    device: Device,
    first_generation: int,
    on_event: OnEvent,
    on_status: OnStatus,
) -> int:
    """Runs the function as the rank that torchrun's environment names; only rank 0 tells of events and progress.

    Raises UserError where this process was not started by torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise UserError(
            "cluster.launcher=torchrun needs processes that torchrun started: "
            "torchrun --nproc-per-node N -m moray …; or choose ray or local"
        )
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    n_restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    own_device = pick_device(local_rank, device)
    check_health(own_device)
    store, _, _ = next(dist.rendezvous("env://"))
    # A terminal's Ctrl-C reaches every process of torchrun, which then repeats it: it must not cut a commit off.
    # torchrun itself kills what outlives its patience.
    with stop_on_signals(impatient=False) as should_stop:
        context = WorkerContext(
            rank=rank,
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=local_rank,
            local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            generation=_agree_on_first(store, rank, first_generation) + n_restarts,
            device=own_device,
            open_store=lambda: store,
            report=lambda step, status: on_status(rank, step, status) if rank == 0 else None,
            should_stop=should_stop,
        )
        ready_kind: Literal["ready", "recovered"] = "recovered" if n_restarts else "ready"
        return run_here(function, argument, context, ready_kind, on_event if rank == 0 else lambda kind, fields: None)


def _agree_on_first(store: dist.Store, rank: int, first_generation: int) -> int:
    """What rank 0 said in torchrun's first try: what a rank finds in a log later may already count that try itself."""
    # torchrun's store outlives its restarts; PyTorch hands it out under a prefix for each of them.
    lasting = store.underlying_store if isinstance(store, dist.PrefixStore) else store
    key = "moray/first_generation"
    return int(lasting.compare_set(key, "", str(first_generation)) if rank == 0 else lasting.get(key))
