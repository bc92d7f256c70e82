"""The one way in: run a function on every worker of a group, however the group comes to be."""

from typing import Any

from moray import UserError
from moray.cluster.group import SILENT, Group, Hooks
from moray.cluster.launchers import Launcher
from moray.cluster.worker import WorkerFunction


def launch(function: WorkerFunction, argument: Any, launcher: Launcher, group: Group, hooks: Hooks = SILENT) -> int:
    """Runs `function(context, argument)` on every worker and returns the exit code of the group.

    ray: starts the workers, watches them, and restarts the group up to `max_restarts` times.
    torchrun: this process is one of those torchrun started, which also decides on workers and restarts.
    slurm: this process is one of the tasks that srun started.
    local: this process is the only worker.
    Each worker has a GPU with device=cuda, none with cpu; auto: what there is when the run begins.
    Each generation takes its number as it begins, under torchrun and srun on rank 0.
    Raises UserError for a user's mistake, the function's own included; under ray WorkerError where no restart is left.
    """
    if launcher == "local":
        from moray.cluster.local import run_local

        if group.workers != 1:
            raise UserError(f"cluster.workers={group.workers} must be 1 with cluster.launcher=local; or choose ray")
        return run_local(function, argument, group.device, hooks)
    if launcher == "torchrun":
        from moray.cluster.torchrun import run_torchrun

        return run_torchrun(function, argument, group.device, hooks)
    if launcher == "slurm":
        from moray.cluster.slurm.tasks import run_task

        return run_task(function, argument, group, hooks)
    if launcher != "ray":
        raise UserError(f"cluster.launcher={launcher!r} is unknown; choose ray, torchrun, slurm or local")
    # Ray is imported only where it is the launcher.
    from moray.cluster.ray.supervisor import supervise

    return supervise(function, argument, group, hooks)
