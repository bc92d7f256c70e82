"""DeepEP's kernels as a hop: over NVLink and RDMA at once, and by themselves once to each node.

Written to the interface that the package documents (ElasticBuffer, V2). It takes bf16 alone; sums over ranks are formed
in fp32.
"""

# Shapes: R rows that leave, K experts of a row at most, Q rows that arrive, A and U their assignments, D model width.

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moray.model.moe.dispatch import Assigned
from moray.parallel.dispatch.wire import Pending, Wire


class DeepEP:
    """Assignments travel with the rows, and scalars with the sums, for its kernels know no other way. All ranks have as
    many rows. Traffic counts a rank's own ones, too, for they come back among the others.
    """

    def __init__(self, assigned: Assigned, held: int, wire: Wire) -> None:
        self._group, self._experts, self._traffic = wire.group, held * wire.ranks, wire.traffic
        self._rows, self._k = assigned.rows, assigned.most // assigned.rows
        begins_A = assigned.starts_R1.index_select(0, assigned.row_A)
        number_A = torch.arange(len(begins_A), device=begins_A.device)
        # What is no assignment has a place behind all others.
        place_A, nowhere = assigned.row_A * self._k + number_A - begins_A, self._rows * self._k
        self._place_A = torch.where(number_A < assigned.starts_R1[-1], place_A, nowhere)
        self._expert_RK = self._table(assigned.expert_A, -1)
        self._gate_RK = self._table(assigned.gate_A.float(), 0)
        self._handle: Any = None
        self._arriving: tuple[Tensor, Tensor] | None = None
        self._place_U: Tensor | None = None
        self._leaving_QK: Tensor | None = None
        self._home_RK: Tensor | None = None

    def there(self, x_RD: Tensor) -> Pending:
        buffer = _buffer(self._group, self._rows, x_RD.shape[1], self._k)
        if self._handle is None:
            x_QD, expert_QK, gate_QK, self._handle, event = buffer.dispatch(
                x_RD.contiguous(),
                topk_idx=self._expert_RK,
                topk_weights=self._gate_RK,
                num_experts=self._experts,
                async_with_compute_stream=True,
            )
            self._arriving = expert_QK, gate_QK
            self._traffic.rows += len(x_QD)
        else:
            x_QD, _, _, _, event = buffer.dispatch(
                x_RD.contiguous(), handle=self._handle, async_with_compute_stream=True
            )
        self._traffic.bytes += x_QD.nbytes
        return _landing(x_QD, event)

    def back(self, x_QD: Tensor) -> Pending:
        buffer = _buffer(self._group, self._rows, x_QD.shape[1], self._k)
        x_RD, self._home_RK, event = buffer.combine(
            x_QD.contiguous(), handle=self._handle, topk_weights=self._leaving_QK, async_with_compute_stream=True
        )
        self._traffic.bytes += x_RD.nbytes
        self._leaving_QK = None
        return _landing(x_RD, event)

    def arrived(self) -> Assigned:
        """To be called after the rows have left."""
        assert self._arriving
        expert_QK, gate_QK = self._arriving
        self._place_U = place_U = (expert_QK >= 0).flatten().nonzero().flatten()
        starts_Q1 = F.pad((expert_QK >= 0).sum(1).cumsum(0), (1, 0))
        expert_U, gate_U = (x.flatten().index_select(0, place_U) for x in self._arriving)
        return Assigned(place_U // self._k, expert_U.long(), gate_U, starts_Q1, gate_QK.numel())

    def scalars_back(self, x_U: Tensor) -> Pending:
        """They are home when the rows are that leave next."""
        assert self._arriving
        assert self._place_U is not None
        zeros_X = torch.zeros_like(self._arriving[1]).flatten()
        self._leaving_QK = zeros_X.index_copy(0, self._place_U, x_U.float()).view_as(self._arriving[1])

        def land() -> Tensor:
            assert self._home_RK is not None
            return F.pad(self._home_RK.flatten(), (0, 1)).index_select(0, self._place_A)

        return land

    def _table(self, x_A: Tensor, otherwise: int) -> Tensor:
        table_X = x_A.new_full((self._rows * self._k + 1,), otherwise)
        return table_X.index_copy(0, self._place_A, x_A)[:-1].view(self._rows, self._k)


@cache
def _buffer(group: dist.ProcessGroup, rows: int, width: int, k: int) -> Any:
    """All layers' own: a batch's kernels come one after the other."""
    from deep_ep import ElasticBuffer  # type: ignore[import-not-found]

    return ElasticBuffer(group, num_max_tokens_per_rank=rows, hidden=width, num_topk=k, deterministic=True)


def _landing(x: Tensor, event: Any) -> Pending:
    def land() -> Tensor:
        event.current_stream_wait()
        return x

    return land
