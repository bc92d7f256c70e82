"""Of which stage of ZeRO a run is, where the user leaves it to the memory that there is."""

from pathlib import Path

import torch

from moray.cluster.host_memory import free_memory
from moray.cluster.worker import WorkerContext
from moray.jobs.config.run import RunConfig
from moray.model.accounting.saved import activation_bytes
from moray.parallel.checkpoint.commits import list_commits
from moray.parallel.gradients import world_sum
from moray.parallel.layout import Layout
from moray.parallel.memory import rank_bytes
from moray.parallel.reduction import Stage

SHARE = 0.5
"""Of the free memory, that stage 1 may take: snapshots, allocators and other programs have some, too."""


def choose_stage(config: RunConfig, context: WorkerContext, layout: Layout, commits: Path | None) -> Stage:
    """The stage set, else that of the newest commit, else 1 where every rank has the memory for it.

    `commits` is the folder of commits, on rank 0 alone, which looks for all. Collective where the stage is left open.
    """
    train = config.train
    if train.exact:
        return 3  # its tree takes the gradient of each micro-batch
    if train.zero_stage != "auto":
        return train.zero_stage
    found = list_commits(commits)[-1:] if commits else []
    recorded = [commit.manifest.metadata["config"]["train"].get("zero_stage", 3) for commit in found]
    # As much is free in later generations as was in the first one.
    fits = context.once(
        f"room for stage 1, {layout}, rank {context.local_rank}", lambda: _fits(config, context, layout)
    )
    is_1, is_3, lack_room = (
        world_sum(torch.tensor([recorded == [1], recorded == [3], not fits]).float()).bool().tolist()
    )
    return 3 if is_3 or (lack_room and not is_1) else 1


def _fits(config: RunConfig, context: WorkerContext, layout: Layout) -> bool:
    train, device = config.train, context.device
    itemsize = 4 if train.dtype == "float32" else 2
    held = rank_bytes(config.model, layout, itemsize)
    activations = activation_bytes(config.model, train.seq_len).total * train.micro_batch * itemsize / 2 / layout.tp
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else free_memory() / context.local_world_size
    return held.state + held.whole + activations <= SHARE * free
