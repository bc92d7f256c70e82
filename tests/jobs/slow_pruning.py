"""A worker function whose rank 0 takes long to remove old commits, as on a network's file system."""

import time
from typing import Any

import moray.parallel.checkpoint.checkpointer as checkpointer
from moray.cluster.worker import WorkerContext
from moray.jobs.config.run import RunConfig
from moray.jobs.training.trainer import train


def train_and_prune_slowly(context: WorkerContext, config: RunConfig) -> int:
    prune = checkpointer.prune

    def prune_slowly(*arguments: Any) -> Any:
        time.sleep(6)
        return prune(*arguments)

    checkpointer.prune = prune_slowly
    return train(context, config)
