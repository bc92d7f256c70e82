"""One worker among those that another program started, which also watches them: torchrun, or srun."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist

from moray.cluster.devices import Device, check_health, pick_device
from moray.cluster.group import SILENT, Hooks
from moray.cluster.local import run_here
from moray.cluster.network import is_loopback, own_address_towards, use_interface_of
from moray.cluster.parent import die_with_parent
from moray.cluster.signals import stop_on_signals
from moray.cluster.worker import TakeGeneration, WorkerContext, WorkerFunction


@dataclass(frozen=True)
class Place:
    """A rank's place, as its environment tells it. `host` is where rank 0 is; `n_restarts` those of the same store."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str
    n_restarts: int = 0


def run_rank(
    function: WorkerFunction,
    argument: Any,
    place: Place,
    open_store: Callable[[], dist.Store],
    device: Device,
    hooks: Hooks,
) -> int:
    """Runs the function as this rank; only rank 0 tells of events and progress."""
    die_with_parent()
    rank = place.rank
    own_device = pick_device(place.local_rank, device)
    check_health(own_device)
    store = open_store()
    _choose_network(store, place)
    # A terminal's Ctrl-C reaches every rank, and whoever started them repeats it: it must not cut a commit off.
    # The starter itself kills what outlives its patience.
    with stop_on_signals(impatient=False) as should_stop:
        context = WorkerContext(
            rank=rank,
            world_size=place.world_size,
            local_rank=place.local_rank,
            local_world_size=place.local_world_size,
            generation=_agree_on_generation(store, place, hooks.take_generation),
            device=own_device,
            open_store=lambda: store,
            report=lambda step, status: hooks.on_status(rank, step, status) if rank == 0 else None,
            should_stop=should_stop,
        )
        ready_kind: Literal["ready", "recovered"] = "recovered" if place.n_restarts else "ready"
        return run_here(function, argument, context, ready_kind, (hooks if rank == 0 else SILENT).on_event)


def _choose_network(store: dist.Store, place: Place) -> None:
    """Has gloo use the network on which nodes meet, where there are several.

    To rank 0's node its own name may well mean loopback: it learns from another one where to look.
    """
    if place.local_world_size == place.world_size:
        return
    address, key = own_address_towards(place.host), "moray/address_of_another_node"
    if is_loopback(address):
        address = own_address_towards(store.get(key).decode())
    else:
        store.set(key, address)
    use_interface_of(address)


def _agree_on_generation(store: dist.Store, place: Place, take_generation: TakeGeneration) -> int:
    """The one that rank 0 takes, as the successor of the last one that it took in the tries before.

    torchrun's store outlives its restarts: each try has a key of its own.
    """
    keys = [f"moray/generation/{number}" for number in range(place.n_restarts + 1)]
    if place.rank == 0:
        taken = [int(store.get(key)) for key in keys[:-1] if store.check([key])]
        store.set(keys[-1], str(take_generation(taken[-1] if taken else None)))
    return int(store.get(keys[-1]))
