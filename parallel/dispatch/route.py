"""The way of one batch's tokens to the ranks of their experts and back, and its gradient, which goes the other way.

there: hop by hop, then each row to the places of its experts. back: sums of each row's experts, then hop by hop those
of its ranks. Forward, tokens go there and weighted sums come back; backward, the sums' gradients go there, and those of
the tokens come back.
"""

# Shapes: N tokens of this rank, A assignments of them to experts; Q rows that are here in the end, M copies of them,
# ordered by expert; D model width.

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moray.model.moe.dispatch import Assigned, Order, by_expert, combine_gradients, of_gates, summed
from moray.parallel.dispatch.hops import Hop
from moray.parallel.dispatch.wire import Pending

MakeHop = Callable[[Assigned], Hop]


class Route:
    """What goes where is found once; then tokens, sums and gradients take the same way. Collective, each of it.

    What one call starts is on its way until the next one wants it: `start` and `arrive`, `leave` and `come_home`.
    """

    def __init__(self, assigned: Assigned, hops: Sequence[MakeHop], partials: torch.dtype, held: int) -> None:
        """hops: from this rank on. partials: the dtype of sums that travel. held: experts of this rank."""
        first, *self._unmade = hops
        self._hops, self._partials, self._held = [first(assigned)], partials, held
        self._found: tuple[Assigned, Order] | None = None
        self._rows: list[Pending] = []
        self._gates: list[Pending] = []

    @property
    def order(self) -> Order:
        return self._here()[1]

    def start(self, x_ND: Tensor) -> None:
        self._rows.append(self._hops[0].there(x_ND))

    def arrive(self) -> Tensor:
        """Rows for this rank's experts, ordered by expert, [M, D]."""
        _, order = self._here()
        x_QD = self._rows.pop()()
        for hop in self._hops[1:]:
            x_QD = hop.there(x_QD)()
        return x_QD.index_select(0, order.row_M)

    def leave(self, rows_MD: Tensor, *, weighted: bool) -> None:
        assigned, order = self._here()
        gate_A = assigned.gate_A.to(rows_MD.dtype) if weighted else None  # as on one process
        parts_QD = summed(rows_MD.to(self._partials), order.place_A, assigned.starts_R1, gate_A)
        for hop in self._hops[:0:-1]:
            parts_QD = hop.back(parts_QD)()
        self._rows.append(self._hops[0].back(parts_QD))

    def come_home(self) -> Tensor:
        """Each token's sum over all its experts, [N, D]."""
        return self._rows.pop()()

    def gates(self) -> Tensor:
        """Of the rows that `arrive` has brought, [M]."""
        assigned, order = self._here()
        return assigned.gate_A.index_select(0, order.order_M)

    def leave_gates(self, x_M: Tensor) -> None:
        """A number for each of the rows is on its way, too."""
        assigned, order = self._here()
        x_A = of_gates(x_M, order.place_A, assigned.starts_R1)
        for hop in self._hops[:0:-1]:
            x_A = hop.scalars_back(x_A)()
        self._gates.append(self._hops[0].scalars_back(x_A))

    def gates_home(self) -> Tensor:
        """One for each assignment, [A]."""
        return self._gates.pop()()

    def _here(self) -> tuple[Assigned, Order]:
        """What has arrived, and its order; found when it is first asked for, after the rows have left."""
        if self._found is None:
            assigned = self._hops[0].arrived()
            for make in self._unmade:
                self._hops.append(make(assigned))
                assigned = self._hops[-1].arrived()
            self._found = assigned, by_expert(assigned, self._held)
        return self._found


class Start(torch.autograd.Function):
    """Tokens leave. What is computed between this and `Arrive` waits neither for them nor, in the backward pass, for
    their gradients. The ticket, an empty tensor, ties the two together.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gate_A: Tensor, route: Route) -> Tensor:
        ctx.route, ctx.dtype = route, x_ND.dtype
        route.start(x_ND)
        return x_ND.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return ctx.route.come_home().to(ctx.dtype), ctx.route.gates_home(), None


class Arrive(torch.autograd.Function):
    """The ticket for the rows of this rank's experts, ordered by expert: [0] -> [M, D]."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return route.arrive()

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.route.leave(grad_MD.contiguous(), weighted=False)
        return grad_MD.new_empty(0), None


class Combine(torch.autograd.Function):
    """What experts have made of their rows for each token's gate-weighted sum: [M, D] -> [N, D]."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, route: Route) -> Tensor:
        ctx.route = route
        ctx.save_for_backward(rows_MD)
        route.leave(rows_MD, weighted=True)
        return route.come_home().to(rows_MD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (rows_MD,) = ctx.saved_tensors
        ctx.route.start(grad_ND)
        grad_MD, of_gates_M = combine_gradients(ctx.route.arrive(), rows_MD, ctx.route.gates())
        ctx.route.leave_gates(of_gates_M)
        return grad_MD, None
