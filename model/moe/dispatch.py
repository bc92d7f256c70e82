"""Moving tokens to their experts and back, on one device: a sort by expert, and sums over each token's experts.

`parallel.dispatch` has dispatchers with the same methods for tokens and experts that are spread over ranks.
"""

# Shapes: B sequences, T tokens of each on this rank, N = B * T, D model width, E experts, K experts per token, R rows
# (tokens, or those that came from other ranks), A assignments of a row to an expert that are computed, in the order of
# the rows; M the same ones, in the order of the experts.

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moray.model.recompute import cheap

TAIL = 256
"""Most places in a sum of those that are none."""


@dataclass(frozen=True)
class Assigned:
    """Assignments of R rows to experts: whose each is, its expert, how much it counts, and where a row's own begin.

    row_A, expert_A, starts_R1 (one more than rows: the last one's end): int64. most: as many as there can be;
    most_of_expert: as many as one expert can have, if anything limits that. Then a GPU need not be asked how many there
    are: those that are none stand at the end, behind the last row's, with an expert that does not exist.
    """

    row_A: Tensor
    expert_A: Tensor
    gate_A: Tensor
    starts_R1: Tensor
    most: int
    most_of_expert: int | None = None

    @property
    def rows(self) -> int:
        return len(self.starts_R1) - 1

    def of_ranks(self, ranks: int, row_A: Tensor, expert_A: Tensor, gate_A: Tensor, starts_R1: Tensor) -> "Assigned":
        """Such of so many ranks, each of which may have as many as this one."""
        limit = None if self.most_of_expert is None else self.most_of_expert * ranks
        return Assigned(row_A, expert_A, gate_A, starts_R1, self.most * ranks, limit)


def assigned(
    chosen_NK: Tensor,
    kept_NK: Tensor | None,
    gates_NK: Tensor,
    n_experts: int,
    most_of_expert: int | None = None,
) -> Assigned:
    """What a router has chosen. kept_NK (bool): False for assignments that are dropped; None keeps all."""
    n, k = chosen_NK.shape
    index_A = torch.arange(n * k, device=chosen_NK.device)
    if kept_NK is None:
        starts_R1 = torch.arange(0, n * k + 1, k, device=chosen_NK.device)
        return Assigned(index_A // k, chosen_NK.flatten(), gates_NK.flatten(), starts_R1, n * k, most_of_expert)
    unknown_R1 = index_A.new_empty(n + 1)
    every = Assigned(index_A // k, chosen_NK.flatten(), gates_NK.flatten(), unknown_R1, n * k, most_of_expert)
    return kept(every, kept_NK.flatten(), n_experts)[0]


def kept(every: Assigned, is_kept_A: Tensor, n_experts: int) -> tuple[Assigned, Tensor]:
    """Those of the assignments that are kept, and which of all they are; of `every`, starts_R1 need not be right."""
    counts_R = every.row_A.new_zeros(every.rows).scatter_add_(0, every.row_A, is_kept_A.long())
    expert_A, limit = every.expert_A, every.most_of_expert
    if limit is None or may_wait(is_kept_A.device):
        index_A = is_kept_A.nonzero().flatten()
    else:
        index_A = (~is_kept_A).argsort(stable=True)[: n_experts * limit]
        expert_A = torch.where(is_kept_A, expert_A, n_experts)
    row_A, expert_A, gate_A = (x.index_select(0, index_A) for x in (every.row_A, expert_A, every.gate_A))
    starts_R1 = F.pad(counts_R.cumsum(0), (1, 0))
    return replace(every, row_A=row_A, expert_A=expert_A, gate_A=gate_A, starts_R1=starts_R1), index_A


def may_wait(device: torch.device) -> bool:
    """Whether asking a device for a number costs nothing: a GPU would run out of work meanwhile."""
    return device.type == "cpu"


@dataclass(frozen=True)
class Order:
    """Assignments in the order of their experts, and within one of their rows: which assignment each is and of which
    row, where each assignment's place is, and how many (int64) each expert has.
    """

    order_M: Tensor
    row_M: Tensor
    place_A: Tensor
    counts_E: Tensor


def by_expert(assigned: Assigned, n_experts: int) -> Order:
    """Rows keep their order within an expert, as the sort is stable; what is no assignment is last, and not counted."""
    order_M, counts_E1 = assigned.expert_A.argsort(stable=True), counted(assigned.expert_A, n_experts + 1)
    return Order(order_M, assigned.row_A[order_M], invert(order_M), counts_E1[:-1])


def counted(index_A: Tensor, n: int) -> Tensor:
    """How often each of n numbers is there; bincount would make a GPU wait to learn how many there are."""
    return index_A.new_zeros(n).scatter_add_(0, index_A, torch.ones_like(index_A))


def invert(order_M: Tensor) -> Tensor:
    """The permutation that undoes another: inverse[order[i]] = i."""
    inverse = torch.empty_like(order_M)
    inverse[order_M] = torch.arange(len(order_M), device=order_M.device)
    return inverse


def summed(rows_MD: Tensor, place_A: Tensor, starts_R1: Tensor, gate_A: Tensor | None = None) -> Tensor:
    """sum_a gate_a rows[place_a] of each row's own a, [R, D]: deterministic, rounded once, without a gradient.

    Sums of bf16 are formed in fp32; gates are rounded to the rows' dtype.
    """
    rows = len(starts_R1) - 1
    gate_A = None if gate_A is None else gate_A.to(rows_MD.dtype)
    if not may_wait(place_A.device):
        # What is none makes sums of its own, which are thrown away: short ones, as a GPU forms each in one thread.
        ends = torch.arange(TAIL, len(place_A) + TAIL, TAIL, device=place_A.device)
        starts_R1 = torch.cat((starts_R1, (starts_R1[-1] + ends).clamp(max=len(place_A))))
    # The last offset is that of one more sum: as the end of the last one, CUDA's kernel does not know it.
    total: Tensor = torch.embedding_bag(rows_MD, place_A, starts_R1, False, 0, False, gate_A, False)[0]
    return total[:rows]


def of_gates(x_M: Tensor, place_A: Tensor, starts_R1: Tensor) -> Tensor:
    """A number of each row in the order of the experts, in the order of the assignments; 0 of those that are none."""
    x_A = x_M.index_select(0, place_A)
    return torch.where(torch.arange(len(x_A), device=x_A.device) < starts_R1[-1], x_A, 0)


def combine_gradients(grad_MD: Tensor, rows_MD: Tensor, gate_M: Tensor) -> tuple[Tensor, Tensor]:
    """Of an expert's rows, and of their gates: what `summed` with gates does to each. Writes over grad_MD."""
    of_gate_M = (grad_MD * rows_MD).sum(-1, dtype=torch.promote_types(grad_MD.dtype, gate_M.dtype))
    return grad_MD.mul_(gate_M[:, None].to(grad_MD.dtype)), of_gate_M


class Spread(torch.autograd.Function):
    """Each row for every one of its assignments, in the order of the experts; its gradient sums the copies.

    Both directions read what they need and write each place once: deterministic.
    """

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, row_M: Tensor, place_A: Tensor, starts_R1: Tensor) -> Tensor:
        ctx.save_for_backward(place_A, starts_R1)
        return x_RD.index_select(0, row_M)  # on CPUs twice as fast as x_RD[row_M]

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return summed(grad_MD.contiguous(), *ctx.saved_tensors), None, None, None


class Combine(torch.autograd.Function):
    """Each row's gate-weighted sum over what its experts have made of it: [M, D], gates [A] -> [R, D]."""

    @staticmethod
    def forward(
        ctx: Any, rows_MD: Tensor, gate_A: Tensor, order_M: Tensor, row_M: Tensor, place_A: Tensor, starts_R1: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows_MD, gate_A, order_M, row_M, place_A, starts_R1)
        return summed(rows_MD, place_A, starts_R1, gate_A)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows_MD, gate_A, order_M, row_M, place_A, starts_R1 = ctx.saved_tensors
        grad_MD = grad_RD.index_select(0, row_M)
        grad_MD, of_gate_M = combine_gradients(grad_MD, rows_MD, gate_A.index_select(0, order_M))
        return grad_MD, of_gates(of_gate_M, place_A, starts_R1), None, None, None, None


@dataclass(frozen=True)
class Sent:
    """Rows on their way, which here is none, and what brings them back."""

    rows_MD: Tensor
    assigned: Assigned
    order: Order


class LocalDispatcher:
    """Moves tokens to experts that all live on this rank, and back."""

    def send(self, x_ND: Tensor, assigned: Assigned, n_experts: int) -> Any:
        """Tokens leave for their experts. What does not need them can be computed before `receive`."""
        order = by_expert(assigned, n_experts)
        rows_MD = cheap(Spread.apply, x_ND, order.row_M, order.place_A, assigned.starts_R1)
        return Sent(rows_MD, assigned, order)

    def receive(self, sent: Any) -> tuple[Tensor, Tensor]:
        """The rows for this rank's experts, ordered by expert, and the experts' counts."""
        return sent.rows_MD, sent.order.counts_E

    def combine(self, rows_MD: Tensor, sent: Any) -> Tensor:
        """Each token's gate-weighted sum over its experts, [N, D]; 0 where all were dropped."""
        order, assigned = sent.order, sent.assigned
        combined: Tensor = Combine.apply(
            rows_MD, assigned.gate_A, order.order_M, order.row_M, order.place_A, assigned.starts_R1
        )
        return combined

    def of_devices(self, tokens_E: Tensor) -> Tensor:
        """A number of each expert's, [E], summed over those of each device that shares them, [P]: here, all."""
        return tokens_E.sum(0, keepdim=True)

    def traffic(self) -> Tensor:
        """Rows and bytes that came to each of these devices from the others since `forget_traffic`, as far as this rank
        knows: what came to itself, [2, P] (fp64).
        """
        return torch.zeros(2, 1, dtype=torch.float64)

    def forget_traffic(self) -> None:
        """Begins to count them anew."""

    def own(self, x_BT: Tensor) -> Tensor:
        """The part of a [B, T] tensor whose tokens this rank routes: here, all of it."""
        return x_BT

    def whole(self, x_BTK: Tensor) -> Tensor:
        """What `own` took the part of, from all ranks that hold the same sequences; without a gradient."""
        return x_BTK

    def total(self, *statistics: Tensor) -> tuple[Tensor, ...]:
        """Sums statistics over the ranks that hold parts of the same sequences: here, one rank holds them whole."""
        return statistics
