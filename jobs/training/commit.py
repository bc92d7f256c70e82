"""What a commit of a training run holds beside the tensors, and what is said where it cannot be written."""

import platform
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from moray import UserError
from moray.jobs.training.adapters import record_of
from moray.jobs.training.begin import Training
from moray.jobs.training.metrics import MetricsLog
from moray.parallel.checkpoint.checkpointer import DiskFullError
from moray.parallel.placement import placement_of


def progress(training: Training, row: dict[str, Any]) -> dict[str, Any]:
    """How far the run has come, beside its tensors: what `go_on_from` takes up."""
    config = training.config
    return {
        "data": {
            "position": training.position,
            "skipped": training.position - training.step * config.train.global_batch,
            "fingerprint": training.sources.fingerprint,
        },
        "applied": training.applied,
        "placement": placement_of(training.decoder),
        "expert_load": None if training.expert_load is None else training.expert_load.tolist(),
        "schedule": {"step": training.step, "lr": row["lr"]},
        # Every random number is a function of (seed, name) or (seed, position): the seed is all the state there is.
        "rng": {"seed": config.train.seed},
        "loss": row["loss"],
        **record_of(config, training.base),
        **({"frozen": {name: base.record() for name, base in training.beside.items()}} if training.beside else {}),
    }


def commit(training: Training, row: dict[str, Any], log: MetricsLog | None) -> None:
    """Commits weights, optimizer, routing bias, data position and all else a resume needs, as one."""
    metadata = {
        "config": training.config.model_dump(),
        "layout": training.layout.model_dump(),
        **progress(training, row),
        "versions": versions(),
    }
    training.committed = training.step
    training.checkpointer.save(training.step, training.state(), metadata, before=log.flush_to_disk if log else None)


def finish_commits(training: Training) -> None:
    """Waits for the last commit. Raises UserError if the disk is full: to start again would not help."""
    try:
        training.checkpointer.finish()
    except DiskFullError as error:
        run = training.config.run.dir
        raise UserError(
            f"run.dir={run}: the disk is full: {error}; free space and give the same command again"
        ) from None


def versions() -> dict[str, str]:
    """The libraries that made a commit; torchrun does without Ray."""
    installed = {name: version(name) for name in ("torch", "safetensors", "numpy", "ray") if find_spec(name)}
    return {"python": platform.python_version(), **installed}
