"""DeepEP's hop against the all-to-all: over gloo, by a stand-in for the package, for its kernels need GPUs.

The stand-in does what DeepEP documents of ElasticBuffer's `dispatch` and `combine`. That the kernels do so is not
tested here.
"""

import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch import Tensor

from moray import UserError
from moray.model.moe.dispatch import assigned
from moray.parallel.dispatch.hops import AllToAll
from moray.parallel.dispatch.kinds import check_kind
from moray.parallel.dispatch.wire import Traffic, Wire

TOKENS, WIDTH, EXPERTS, K = 12, 8, 8, 3


@dataclass
class Handle:
    """Of each rank: the tokens that each rank sent it, as pairs of rank and token, in that order."""

    topk_idx: Tensor
    arriving: list[list[tuple[int, int]]]
    own: int


class Event:
    def current_stream_wait(self) -> None:
        pass


class ElasticBuffer:
    def __init__(self, group: dist.ProcessGroup, **limits: Any) -> None:
        self.group, self.limits = group, limits
        assert limits["num_max_tokens_per_rank"] == TOKENS

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int | None = None,
        handle: Handle | None = None,
        async_with_compute_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Handle, Event]:
        ranks, own = self.group.size(), self.group.rank()
        of_all: list[Any] = [None] * ranks
        dist.all_gather_object(of_all, (x, topk_idx, topk_weights), group=self.group)
        if handle:
            rows = [of_all[rank][0][token] for rank, token in handle.arriving[own]]
            return torch.stack(rows), None, None, handle, Event()
        assert topk_idx is not None
        assert num_experts is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        held = num_experts // ranks
        tokens = [(rank, n) for rank in range(ranks) for n in range(len(x))]
        arriving = [
            [(rank, n) for rank, n in tokens if holder in (of_all[rank][1][n] // held).tolist()]
            for holder in range(ranks)
        ]
        found = [tuple(part[token] for part in of_all[rank]) for rank, token in arriving[own]]
        rows, experts, weights = (torch.stack(parts) for parts in zip(*found, strict=True))
        is_here = experts // held == own
        experts, weights = torch.where(is_here, experts % held, -1), torch.where(is_here, weights, 0)
        return rows, experts, weights, Handle(topk_idx, arriving, own), Event()

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, async_with_compute_stream: bool = False
    ) -> tuple[Tensor, Tensor | None, Event]:
        of_all: list[Any] = [None] * self.group.size()
        dist.all_gather_object(of_all, (x, topk_weights), group=self.group)
        total = x.new_zeros(TOKENS, x.shape[1])
        weights = None if topk_weights is None else topk_weights.new_zeros(TOKENS, K)
        for holder, arrived in enumerate(handle.arriving):
            for i, (rank, token) in enumerate(arrived):
                if rank == handle.own:
                    total[token] += of_all[holder][0][i]
                    if weights is not None:
                        weights[token] += of_all[holder][1][i]
        return total, weights, Event()


def both_hops() -> list[tuple[Tensor, ...]]:
    sys.modules["deep_ep"] = types.SimpleNamespace(ElasticBuffer=ElasticBuffer)  # type: ignore[assignment]
    from moray.parallel.dispatch.deepep import DeepEP

    group, generator = dist.group.WORLD, torch.Generator().manual_seed(dist.get_rank())
    assert group
    x_ND = torch.randn(TOKENS, WIDTH, generator=generator)
    chosen_NK = torch.rand(TOKENS, EXPERTS, generator=generator).topk(K).indices
    kept_NK, gates_NK = torch.rand(2, TOKENS, K, generator=generator).unbind()
    assignments = assigned(chosen_NK, kept_NK > 0.2, gates_NK, EXPERTS)
    found = []
    for kind in (AllToAll, DeepEP):
        hop = kind(assignments, EXPERTS // group.size(), Wire(group, Traffic()))
        landing = hop.there(x_ND)
        arrived, x_QD = hop.arrived(), landing()
        again_QD = hop.there(2 * x_ND)()
        scalars = hop.scalars_back(arrived.gate_A * (arrived.expert_A + 1))
        home_ND = hop.back(3 * x_QD)()
        ours = (arrived.row_A, arrived.expert_A, arrived.gate_A, arrived.starts_R1)
        found.append((x_QD, again_QD, home_ND, scalars(), *ours))
    return found


def test_it_does_what_the_all_to_all_does(pool: Pool) -> None:
    for ours, theirs in pool.run(both_hops, 2):
        *others, row_A, expert_A, gate_A, starts_R1 = theirs
        for found, expected in zip((*others, row_A, starts_R1), (*ours[:-4], ours[-4], ours[-1]), strict=True):
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(expert_A, ours[-3])
        torch.testing.assert_close(gate_A, ours[-2])


def test_where_it_cannot_be_had_says_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"layout.dispatcher=deepep needs GPUs.*cpu; and the package deep_ep.*alltoall"):
        check_kind("deepep", "cpu", torch.bfloat16)
    with pytest.raises(UserError, match=r"train.dtype=bfloat16, which is float32"):
        check_kind("deepep", "cuda", torch.float32)
    check_kind("allgather", "cpu", torch.float32)
