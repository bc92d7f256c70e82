"""The one way in: run a function on every worker of a group, however the group comes to be."""

from typing import Any, Literal

from moray import UserError
from moray.cluster.devices import Device
from moray.cluster.events import OnEvent, OnStatus
from moray.cluster.worker import TakeGeneration, WorkerFunction, count_up

Launcher = Literal["ray", "torchrun", "local"]


def launch(
    function: WorkerFunction,
    argument: Any,
    *,
    launcher: Launcher,
    workers: int,
    device: Device = "auto",
    take_generation: TakeGeneration = count_up,
    max_restarts: int = 3,
    heartbeat_timeout_s: float = 60.0,
    startup_timeout_s: float = 600.0,
    lease_timeout_s: float = 20.0,
    placement_timeout_s: float = 60.0,
    on_event: OnEvent = lambda kind, fields: None,
    on_status: OnStatus = lambda rank, step, status: None,
) -> int:
    """Runs `function(context, argument)` on every worker and returns the exit code of the group.

    ray: starts `workers` processes, watches them, and restarts the group up to `max_restarts` times.
    torchrun: this process is one of those torchrun started, which also decides on workers and restarts.
    local: this process is the only worker.
    Each worker has a GPU with device=cuda, none with cpu; auto: what there is when the run begins.
    Each generation takes its number as it begins, under torchrun on rank 0. Only ray's workers are watched, and only
    there do the timeouts and `max_restarts` mean anything: see supervise().
    Raises UserError for a user's mistake, the function's own included; under ray WorkerError where no restart is left.
    """
    if launcher == "local":
        from moray.cluster.local import run_local

        if workers != 1:
            raise UserError(f"cluster.workers={workers} must be 1 with cluster.launcher=local; or choose ray")
        return run_local(function, argument, device, take_generation, on_event, on_status)
    if launcher == "torchrun":
        from moray.cluster.torchrun import run_torchrun

        return run_torchrun(function, argument, device, take_generation, on_event, on_status)
    if launcher != "ray":
        raise UserError(f"cluster.launcher={launcher!r} is unknown; choose ray, torchrun or local")
    # Ray is imported only where it is the launcher.
    from moray.cluster.ray.supervisor import supervise

    return supervise(
        function,
        argument,
        workers=workers,
        device=device,
        take_generation=take_generation,
        max_restarts=max_restarts,
        heartbeat_timeout_s=heartbeat_timeout_s,
        startup_timeout_s=startup_timeout_s,
        lease_timeout_s=lease_timeout_s,
        placement_timeout_s=placement_timeout_s,
        on_event=on_event,
        on_status=on_status,
    )
