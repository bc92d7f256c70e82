"""Whether a run's workers have the memory that it needs: found out before there is anything of a model."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moray.cluster.host_memory import free_memory
from moray.cluster.worker import WorkerContext
from moray.jobs.alignment.critic import critic_model
from moray.jobs.config.run import RunConfig
from moray.jobs.models.weights import config_of
from moray.parallel.gradients import of_all_ranks
from moray.parallel.layout import Layout
from moray.parallel.memory import RankMemory, frozen_memory, rank_memory
from moray.parallel.reduction import Stage


def needed(config: RunConfig, layout: Layout, dtype: str, stage: Stage) -> RankMemory:
    """Of each worker."""
    train = config.train
    frozen = sum(
        frozen_memory(config_of(Path(path)), layout, getattr(torch, dtype), stage) for _, path in config.frozen.values()
    )
    learns = partial(
        rank_memory,
        layout=layout,
        seq_len=train.seq_len,
        micro_batch=train.micro_batch,
        dtype=getattr(torch, dtype),
        stage=stage,
        recompute=train.recompute,
        moments=getattr(torch, config.optimizer.moments),
    )
    found = learns(config.model, lora=config.adapters)
    if critic := critic_model(config):
        # The two learn in turn: what a backward pass needs is there once, of the one that needs more.
        other, held = learns(critic), ("weights", "gradients", "optimizer", "gathered")
        both = zip(found._asdict().items(), other, strict=True)
        found = RankMemory(*(one + more if name in held else max(one, more) for (name, one), more in both))
    return found._replace(weights=found.weights + frozen)


def free(context: WorkerContext) -> float:
    """Bytes that this worker may have: of its GPU, or its share of what its machine has. The same in all generations,
    though their machines hold snapshots by then.
    """
    if context.device.type == "cuda":
        return context.once(f"free memory of {context.device}", lambda: torch.cuda.mem_get_info(context.device)[0])
    share = context.local_world_size
    return context.once(f"free memory for each of {share}", lambda: free_memory() / share)


def warn_of_too_little(
    config: RunConfig, context: WorkerContext, layout: Layout, note: Callable[[str, dict[str, Any]], None]
) -> None:
    """An event on rank 0 where what is needed is not there. Collective.

    A warning and no error: what the estimate leaves out, and what other programs will free, nobody knows.
    """
    found = needed(config, layout, config.train.dtype, 1 if config.train.zero_stage == 1 else 3)
    free_of = of_all_ranks(free(context))
    if (least := min(free_of)) < found.total and context.rank == 0:
        short = sum(bytes_free < found.total for bytes_free in free_of)
        parts = {name: round(size) for name, size in found._asdict().items()}
        note("short_of_memory", {"needed": round(found.total), "parts": parts, "ranks": short, "least": round(least)})
