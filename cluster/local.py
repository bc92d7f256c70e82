"""One worker in this very process, without Ray and without torchrun."""

import os
import time
from typing import Any

import torch.distributed as dist

from cluster.devices import check_health, pick_device
from cluster.events import OnEvent, OnStatus
from cluster.signals import stop_on_signals
from cluster.worker import EXIT_DONE, WorkerContext, WorkerFunction


def run_local(function: WorkerFunction, argument: Any, on_event: OnEvent, on_status: OnStatus) -> int:
    """Runs the function as the only rank of its group; returns its exit code. Its exceptions pass through."""
    device = pick_device(0)
    check_health(device)
    with stop_on_signals(impatient=True) as should_stop:
        context = WorkerContext(
            rank=0,
            world_size=1,
            local_rank=0,
            local_world_size=1,
            generation=1,
            device=device,
            open_store=dist.HashStore,
            report=lambda step, status: on_status(0, step, status),
            should_stop=should_stop,
        )
        return run_here(function, argument, context, on_event)


def run_here(function: WorkerFunction, argument: Any, context: WorkerContext, on_event: OnEvent) -> int:
    """Calls the function between a start and an end event."""
    began = time.monotonic()
    on_event(
        "start",
        {
            "generation": context.generation,
            "workers": context.world_size,
            "ranks": [{"rank": context.rank, "pid": os.getpid()}],
        },
    )
    code = function(context, argument) or EXIT_DONE
    on_event("end", {"generation": context.generation, "code": code, "seconds": time.monotonic() - began})
    return code
