"""Moving tokens to their experts and back, on one device: a sort by expert, and its inverse.

`parallel.expert` has dispatchers with the same methods for tokens and experts that are spread over ranks.
"""

# Shapes: B sequences, T tokens of each on this rank, N = B * T, D model width, E experts, K experts per token,
# A = N * K assignments of a token to an expert, M rows sent to experts: those of the A that are kept.

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moray.model.recompute import cheap


@dataclass(frozen=True)
class Sorted:
    """Rows in the order of their experts; counts_E (int64): rows of each.

    order_M: which assignment each row is of. inverse_A: the row of each assignment, or None where some were dropped.
    """

    rows_MD: Tensor
    counts_E: Tensor
    order_M: Tensor
    inverse_A: Tensor | None


def sort_by_expert(x_ND: Tensor, chosen_NK: Tensor, kept_NK: Tensor | None, n_experts: int) -> Sorted:
    """Copies each token to its K experts' places. The sort is stable, so tokens keep their order within an expert.

    kept_NK (bool): False for assignments that are dropped, which get no row; None keeps all.
    """
    expert_A, k = chosen_NK.flatten(), chosen_NK.shape[1]
    if kept_NK is None:
        order_M = expert_A.argsort(stable=True)
        inverse_A = invert(order_M)
    else:
        # The only wait for the device here: how many rows there are.
        kept_M = kept_NK.flatten().nonzero().flatten()
        expert_A = expert_A[kept_M]
        order_M, inverse_A = kept_M[expert_A.argsort(stable=True)], None
    # bincount would make a GPU wait to learn how many bins there are.
    counts_E = expert_A.new_zeros(n_experts).scatter_add_(0, expert_A, torch.ones_like(expert_A))
    rows_MD = cheap(partial(_spread, k), x_ND, order_M, inverse_A)
    return Sorted(rows_MD, counts_E, order_M, inverse_A)


def _spread(k: int, x_ND: Tensor, order_M: Tensor, inverse_A: Tensor | None) -> Tensor:
    rows_MD: Tensor = Spread.apply(x_ND, order_M, inverse_A, k)
    return rows_MD


def unsort(rows_MD: Tensor, plan: Sorted, gates_NK: Tensor) -> Tensor:
    """Brings each token's K results back together, weighted by its gates; dropped ones are 0. Shape: [N, D]."""
    if plan.inverse_A is None:
        rows_AD = _placed(rows_MD, plan.order_M, gates_NK.numel())
    else:
        rows_AD = Permute.apply(rows_MD, plan.inverse_A, plan.order_M)
    weighted_NKD = rows_AD.unflatten(0, gates_NK.shape) * gates_NK[..., None].to(rows_MD.dtype)
    return weighted_NKD.sum(1)


def invert(order_M: Tensor) -> Tensor:
    """The permutation that undoes another: inverse[order[i]] = i."""
    inverse = torch.empty_like(order_M)
    inverse[order_M] = torch.arange(len(order_M), device=order_M.device)
    return inverse


def _placed(rows_MD: Tensor, order_M: Tensor, n_assignments: int) -> Tensor:
    """Each assignment's row; zeros for those that were dropped. No place is written twice: deterministic."""
    return rows_MD.new_zeros(n_assignments, rows_MD.shape[1]).index_copy(0, order_M, rows_MD)


class Permute(torch.autograd.Function):
    """Rows in another order. Both directions are gathers: deterministic, and no scatter with atomics.

    Shapes: x [M, D], order [M] and its inverse -> x[order].
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_M)
        return x_MD.index_select(0, order_M)  # on CPUs twice as fast as x_MD[order_M]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_MD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse_M,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_MD.index_select(0, inverse_M), None, None


class Spread(torch.autograd.Function):
    """Each token's row for every assignment that is kept, in the order of the experts; its gradient sums the copies.

    Shapes: x_ND, order [M], inverse [A] or None, K -> [M, D].
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x_ND: Tensor, order_M: Tensor, inverse_A: Tensor | None, k: int
    ) -> Tensor:
        ctx.save_for_backward(order_M, inverse_A)  # type: ignore[arg-type]
        ctx.shape = (len(x_ND), k)  # type: ignore[attr-defined]
        return x_ND.index_select(0, order_M // k)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        order_M, inverse_A = ctx.saved_tensors  # type: ignore[attr-defined]
        n, k = ctx.shape  # type: ignore[attr-defined]
        grad_AD = _placed(grad_MD, order_M, n * k) if inverse_A is None else grad_MD.index_select(0, inverse_A)
        return (grad_AD if k == 1 else grad_AD.unflatten(0, (n, k)).sum(1)), None, None, None


class LocalDispatcher:
    """Moves tokens to experts that all live on this rank, and back."""

    def dispatch(
        self, x_ND: Tensor, chosen_NK: Tensor, kept_NK: Tensor | None, n_experts: int
    ) -> tuple[Tensor, Tensor, Sorted]:
        """Returns the rows for this rank's experts, ordered by expert, their counts, and what `combine` needs.

        kept_NK (bool): False for assignments that are neither sent nor computed; None keeps all.
        """
        plan = sort_by_expert(x_ND, chosen_NK, kept_NK, n_experts)
        return plan.rows_MD, plan.counts_E, plan

    def combine(self, rows_MD: Tensor, plan: Sorted, gates_NK: Tensor) -> Tensor:
        """Returns each token's gate-weighted sum over its experts, [N, D]."""
        return unsort(rows_MD, plan, gates_NK)

    def own(self, x_BT: Tensor) -> Tensor:
        """The part of a [B, T] tensor whose tokens this rank routes: here, all of it."""
        return x_BT

    def whole(self, x_BTK: Tensor) -> Tensor:
        """What `own` took the part of, from all ranks that hold the same sequences; without a gradient."""
        return x_BTK

    def total(self, *statistics: Tensor) -> tuple[Tensor, ...]:
        """Sums statistics over the ranks that hold parts of the same sequences: here, one rank holds them whole."""
        return statistics
