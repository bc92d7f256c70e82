"""What the machines decide of a run where its user does not: once, and a later attempt on others keeps to it."""

from pathlib import Path
from typing import TypeVar

import torch

from moray.cluster.worker import WorkerContext
from moray.jobs.config.run import RunConfig
from moray.jobs.training.memory import free, needed
from moray.parallel.checkpoint.commits import list_commits, newest_record
from moray.parallel.control_plane import ControlPlane
from moray.parallel.gradients import world_sum
from moray.parallel.layout import Layout

SHARE = 0.5
"""Of the free memory, that ZeRO's stage 1 may take: snapshots, allocators and other programs have some, too."""

T = TypeVar("T")


def decided(config: RunConfig, context: WorkerContext, layout: Layout, commits: Path | None) -> RunConfig:
    """The config with `train.dtype` and `train.zero_stage`: those set, else those of the newest commit, else bf16 and
    stage 1 where every rank has the instructions and the memory for it. Of a mixture with its past, `as_recorded`.

    `commits` is the folder of commits, on rank 0 alone, which looks for all. Collective where something is left open.
    """
    if config.data.mix:
        # A rank that sees a commit late would go on with other data.
        data = ControlPlane().from_rank_0(lambda: as_recorded(config, commits).data if commits else config.data)
        config = config.model_copy(update={"data": data})
    newest = list_commits(commits)[-1:] if commits else []
    recorded = newest[0].manifest.metadata["config"]["train"] if newest else {}

    def choose(name: str, better: T, other: T, is_able: bool) -> T:
        """Collective. A commit of before a setting existed was of the `other` kind."""
        found = recorded.get(name, other) if recorded else None
        votes = torch.tensor([found == better, found == other, not is_able], dtype=torch.float32)
        was_better, was_other, lacks = world_sum(votes).bool().tolist()
        return better if was_better or not (was_other or lacks) else other

    chosen = dict(config.train)
    if chosen["dtype"] == "auto":
        chosen["dtype"] = choose("dtype", "bfloat16", "float32", has_fast_bf16(context.device))
    if config.train.exact:
        chosen["zero_stage"] = 3  # its tree takes the gradient of each micro-batch
    elif chosen["zero_stage"] == "auto":
        has_room = needed(config, layout, chosen["dtype"], 1).total <= SHARE * free(context)
        chosen["zero_stage"] = choose("zero_stage", 1, 3, has_room)
    return config.model_copy(update={"train": config.train.model_copy(update=chosen)})


def as_recorded(config: RunConfig, commits: Path) -> RunConfig:
    """With the weights of a mixture as the newest commit has them up to where it ended, and as asked for from there on.

    So a change of weights is a phase, in the settings that the next commit holds; and what a run has seen stays what it
    was, from whichever commit it goes on.
    """
    newest = newest_record(commits) if config.data.mix else None
    if newest is None:
        return config
    there = newest.metadata
    batch = there.get("data", {}).get("position", 0) // config.train.global_batch
    data = config.data.going_on_from(there["config"].get("data", {}), batch)
    return config.model_copy(update={"data": data})


def has_fast_bf16(device: torch.device) -> bool:
    """Whether it has instructions for products in bf16: a CPU without them is tens of times slower than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)
