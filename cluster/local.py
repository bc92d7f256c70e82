"""One worker in this very process, without Ray and without torchrun."""

import os
import socket
import time
from dataclasses import replace
from typing import Any, Literal

import torch.distributed as dist

from moray.cluster.devices import Device, check_health, pick_device
from moray.cluster.events import OnEvent
from moray.cluster.exit_codes import EXIT_DONE
from moray.cluster.group import Hooks
from moray.cluster.signals import stop_on_signals
from moray.cluster.worker import WorkerContext, WorkerFunction


def run_local(function: WorkerFunction, argument: Any, device: Device, hooks: Hooks) -> int:
    """Runs the function as the only rank of its group; returns its exit code. Its exceptions pass through."""
    own_device = pick_device(0, device)
    check_health(own_device)
    with stop_on_signals(impatient=True) as should_stop:
        context = WorkerContext(
            rank=0,
            world_size=1,
            local_rank=0,
            local_world_size=1,
            generation=hooks.take_generation(None),
            device=own_device,
            open_store=dist.HashStore,
            report=lambda step, status: hooks.on_status(0, step, status),
            should_stop=should_stop,
        )
        return run_here(function, argument, context, "ready", hooks.on_event)


def run_here(
    function: WorkerFunction,
    argument: Any,
    context: WorkerContext,
    ready_kind: Literal["ready", "recovered"],
    on_event: OnEvent,
) -> int:
    """Calls the function in this process and tells of its start, first heartbeat and end as the supervisor would."""
    began = time.monotonic()
    generation = context.generation
    is_ready = False

    def report(step: int, status: dict[str, Any]) -> None:
        nonlocal is_ready
        if not is_ready:
            is_ready = True
            on_event(ready_kind, {"generation": generation, "seconds": time.monotonic() - began})
        context.report(step, status)

    ranks = [{"rank": context.rank, "pid": os.getpid(), "node": socket.gethostname()}]
    on_event("start", {"generation": generation, "workers": context.world_size, "ranks": ranks})
    code = function(replace(context, report=report), argument) or EXIT_DONE
    if context.should_stop():
        on_event("stop", {"generation": generation})
    on_event("end", {"code": code, "seconds": time.monotonic() - began})
    return code
