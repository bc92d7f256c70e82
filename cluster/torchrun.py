"""One worker among those that torchrun started; torchrun watches and restarts them."""

import os
from typing import Any, Literal

import torch.distributed as dist

from moray import UserError
from moray.cluster.devices import Device, check_health, pick_device
from moray.cluster.group import SILENT, Hooks
from moray.cluster.local import run_here
from moray.cluster.network import is_loopback, own_address_towards, use_interface_of
from moray.cluster.parent import die_with_parent
from moray.cluster.signals import stop_on_signals
from moray.cluster.worker import TakeGeneration, WorkerContext, WorkerFunction


def run_torchrun(function: WorkerFunction, argument: Any, device: Device, hooks: Hooks) -> int:
    """Runs the function as the rank that torchrun's environment names; only rank 0 tells of events and progress.

    Raises UserError where this process was not started by torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise UserError(
            "cluster.launcher=torchrun needs processes that torchrun started: "
            "torchrun --nproc-per-node N -m moray …; or choose ray or local"
        )
    die_with_parent()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    n_restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    own_device = pick_device(local_rank, device)
    check_health(own_device)
    store, _, _ = next(dist.rendezvous("env://"))
    _choose_network(store)
    # A terminal's Ctrl-C reaches every process of torchrun, which then repeats it: it must not cut a commit off.
    # torchrun itself kills what outlives its patience.
    with stop_on_signals(impatient=False) as should_stop:
        context = WorkerContext(
            rank=rank,
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=local_rank,
            local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            generation=_agree_on_generation(store, rank, n_restarts, hooks.take_generation),
            device=own_device,
            open_store=lambda: store,
            report=lambda step, status: hooks.on_status(rank, step, status) if rank == 0 else None,
            should_stop=should_stop,
        )
        ready_kind: Literal["ready", "recovered"] = "recovered" if n_restarts else "ready"
        return run_here(function, argument, context, ready_kind, (hooks if rank == 0 else SILENT).on_event)


def _choose_network(store: dist.Store) -> None:
    """Has gloo use the network on which nodes meet, where there are several.

    To the node that MASTER_ADDR names, that name may well mean loopback: it learns from another one where to look.
    """
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        return
    address, key = own_address_towards(os.environ["MASTER_ADDR"]), "moray/address_of_another_node"
    if is_loopback(address):
        address = own_address_towards(store.get(key).decode())
    else:
        store.set(key, address)
    use_interface_of(address)


def _agree_on_generation(store: dist.Store, rank: int, n_restarts: int, take_generation: TakeGeneration) -> int:
    """The one that rank 0 takes, as the successor of the last one that it took in torchrun's tries before.

    torchrun's store outlives its restarts: each try has a key of its own.
    """
    keys = [f"moray/generation/{number}" for number in range(n_restarts + 1)]
    if rank == 0:
        taken = [int(store.get(key)) for key in keys[:-1] if store.check([key])]
        store.set(keys[-1], str(take_generation(taken[-1] if taken else None)))
    return int(store.get(keys[-1]))
