"""Training in which something goes wrong: data whose gradient is nan or large, and bits that flip.

`train` is a worker function: what shall go wrong stands in RUN/poison.json. There, `killed_after` is the step behind
which rank 1 of the first generation is killed by SIGKILL.
"""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moray.cluster.worker import WorkerContext
from moray.data.dataset import Dataset
from moray.jobs.config.run import RunConfig
from moray.jobs.training import trainer
from moray.jobs.training.batches import stream_of


@contextmanager
def poisoned(config: RunConfig, nan: tuple[int, ...] = (), spike: tuple[int, ...] = ()) -> Iterator[None]:
    """The first sequence of these batches makes the loss nan, or the gradient large, whoever computes it."""
    stream = stream_of(Dataset.open(config.data.path), config.train, range(1))
    rows = {n: stream.batch(n).tokens_BT[0] for n in (*nan, *spike)}

    def spoil(module: nn.Module, arguments: tuple[Any, ...], x_BTD: Tensor) -> Tensor | None:
        if not isinstance(module, nn.Embedding):
            return None
        for n, row in rows.items():
            if (arguments[0] == row).all(-1).any():
                return x_BTD * torch.nan if n in nan else x_BTD + 1e4 * (x_BTD - x_BTD.detach())
        return None

    hook = nn.modules.module.register_module_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


def train(context: WorkerContext, config: RunConfig) -> int:
    plan = json.loads(Path(config.run.dir, "poison.json").read_text())
    if (last := plan.pop("killed_after", None)) and (context.rank, context.generation) == (1, 1):
        tell = context.report

        def report(step: int, status: dict[str, Any]) -> None:
            if step == last:
                os.kill(os.getpid(), signal.SIGKILL)
            tell(step, status)

        context = replace(context, report=report)
    with poisoned(config, **{name: tuple(batches) for name, batches in plan.items()}):
        return trainer.train(context, config)
