"""Sums over ranks of which each keeps its part (reduce-scatter), without what gloo adds to them.

gloo's own is an all-reduce whose other parts are thrown away: all bytes travel twice. In small groups, ranks send each
other their parts instead; in large ones, that would be a socket to each. Other backends' sums are taken as they are.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

MOST_PEERS = 16


def reduce_scatter(parts_PX: Tensor, own_X: Tensor, group: dist.ProcessGroup) -> None:
    """Writes this rank's part of the sum over the group's P ranks. Shapes: [P, ...], [...]. Collective."""
    if parts_PX.device.type != "cpu" or len(parts_PX) > MOST_PEERS:
        dist.reduce_scatter_single(own_X, parts_PX.flatten(0, 1), group=group)
        return
    found_PX = torch.empty_like(parts_PX)
    dist.all_to_all_single(found_PX, parts_PX, group=group)
    torch.sum(found_PX, 0, out=own_X)


def sum_by_all_to_all(module: FSDPModule) -> None:
    """Has FSDP sum the gradients of a module that it has wrapped, on CPUs, in the same way."""
    for group in module._get_fsdp_state()._fsdp_param_groups:  # the public setter takes modules of one mesh alone
        group._reduce_scatter_comm = _ByAllToAll()


class _ByAllToAll(ReduceScatter):
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        assert op == dist.ReduceOp.SUM
        reduce_scatter(input_tensor.view(group.size(), -1), output_tensor, group)
