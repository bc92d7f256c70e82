"""Training in which something goes wrong: data whose gradient is nan or large, and bits that flip.

`train` is a worker function: what shall go wrong stands in RUN/poison.json. There, `killed_after` is the step behind
which rank 1 of the first generation is killed by SIGKILL, and `flipped` a rank and that of its forward passes, in the
first generation, whose gradient it gets wrong; `free_bytes` is all the memory that machines say they have;
`pause_s` follows every step until RUN/hurry exists. With `fp64`, all is computed in double precision.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moray.cluster.worker import WorkerContext
from moray.data.sources import Sources
from moray.jobs.config.run import RunConfig
from moray.jobs.training import begin, recovery, trainer
from moray.jobs.training.batches import stream_of
from moray.parallel.shard import build_decoder


def is_embedding(module: nn.Module, x_BTD: Tensor) -> bool:
    """Of a pass that computes: those on fake tensors only find out how much memory one takes."""
    return isinstance(module, nn.Embedding) and type(x_BTD) is Tensor


@contextmanager
def poisoned(config: RunConfig, nan: tuple[int, ...] = (), spike: tuple[int, ...] = ()) -> Iterator[None]:
    """The first sequence of these batches makes the loss nan, or the gradient large, whoever computes it."""
    stream = stream_of(Sources.open(config.data.folders), config, range(1))
    rows = {n: stream.batch(n).tokens_BT[0] for n in (*nan, *spike)}

    def spoil(module: nn.Module, arguments: tuple[Any, ...], x_BTD: Tensor) -> Tensor | None:
        if not is_embedding(module, x_BTD):
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


@contextmanager
def flipping(rank: int, calls: range) -> Iterator[None]:
    """The lowest bit of one channel of a gradient, on one rank, in these of its forward passes."""
    passes = 0

    def flip(gradient: Tensor) -> Tensor:
        flipped = gradient.clone()
        flipped.view(torch.int32)[..., 7] ^= 1
        return flipped

    def watch(module: nn.Module, arguments: tuple[Any, ...], x_BTD: Tensor) -> None:
        nonlocal passes
        if is_embedding(module, x_BTD):
            passes += 1
            if dist.get_rank() == rank and passes - 1 in calls:
                x_BTD.register_hook(flip)

    hook = nn.modules.module.register_module_forward_hook(watch)
    try:
        yield
    finally:
        hook.remove()


def pausing(
    tell: Callable[[int, dict[str, Any]], None], pause_s: Callable[[int], float], hurry: Path
) -> Callable[[int, dict[str, Any]], None]:
    """Tells of a step, and sleeps as long as is due behind it after the first word of it."""
    last = -1

    def report(step: int, status: dict[str, Any]) -> None:
        nonlocal last
        tell(step, status)
        if step > last and not hurry.exists():
            last = step
            time.sleep(pause_s(step))

    return report


def train(context: WorkerContext, config: RunConfig) -> int:
    plan = json.loads(Path(config.run.dir, "poison.json").read_text())
    if (last := plan.pop("killed_after", None)) and (context.rank, context.generation) == (1, 1):
        tell = context.report

        def report(step: int, status: dict[str, Any]) -> None:
            if step == last:
                os.kill(os.getpid(), signal.SIGKILL)
            tell(step, status)

        context = replace(context, report=report)
    if pause_s := plan.pop("pause_s", 0.0):
        context = replace(context, report=pausing(context.report, lambda _: pause_s, Path(config.run.dir, "hurry")))
    if free_bytes := plan.pop("free_bytes", None):
        recovery.free_memory = lambda: free_bytes
    rank, call = plan.pop("flipped", (0, 0))
    calls = range(call, call + 1) if call and context.generation == 1 else range(0)
    dtype = {"dtype": torch.float64, "compute_dtype": torch.float64} if plan.pop("fp64", False) else {}
    build = patch.object(begin, "build_decoder", lambda *words, **names: build_decoder(*words, **names | dtype))
    with build, poisoned(config, **{name: tuple(batches) for name, batches in plan.items()}), flipping(rank, calls):
        return trainer.train(context, config)
