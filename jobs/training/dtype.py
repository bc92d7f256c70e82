"""Which dtype the matrix products of a run have, where the user leaves it to the device."""

from pathlib import Path
from typing import Literal

import torch

from moray.jobs.config.sections import TrainSection
from moray.parallel.checkpoint.commits import list_commits
from moray.parallel.gradients import world_sum

Dtype = Literal["bfloat16", "float32"]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether it has instructions for products in bf16: a CPU without them is tens of times slower than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


def choose_dtype(train: TrainSection, device: torch.device, commits: Path | None) -> Dtype:
    """The dtype set, else that of the newest commit, else bf16 where every rank's device is made for it.

    `commits` is the folder of commits, on rank 0 alone, which looks for all. Collective where the dtype is left open.
    """
    if train.dtype != "auto":
        return train.dtype
    found = list_commits(commits)[-1:] if commits else []
    recorded = [commit.manifest.metadata["config"]["train"]["dtype"] for commit in found]
    votes = [recorded == ["float32"], recorded == ["bfloat16"], not has_fast_bf16(device)]
    is_float32, is_bfloat16, lack_bf16 = world_sum(torch.tensor(votes, dtype=torch.float32)).bool().tolist()
    return "float32" if is_float32 or (lack_bf16 and not is_bfloat16) else "bfloat16"
