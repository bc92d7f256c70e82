"""Expert parallelism: tokens travel to the ranks that hold their experts, by all-to-all, and back.

route -> sort by expert -> exchange counts -> exchange rows -> grouped products -> exchange back -> weighted sum
"""

# Shapes: N tokens on this rank, K experts per token, M rows that leave (N * K but for those dropped), R rows that
# arrive, D model width, E experts, e experts of this rank, P expert-parallel ranks.

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moray.model.decoder import Decoder
from moray.model.moe.dispatch import Assigned, LocalDispatcher, Order, by_expert, combine_gradients, summed
from moray.model.moe.layer import MoE
from moray.model.recompute import once
from moray.parallel.hops import AllToAll, Hop, Pending, Traffic
from moray.parallel.layout import Meshes
from moray.parallel.tensor import TokenSlices

MakeHop = Callable[[Assigned], Hop]


class SequenceSlice(LocalDispatcher):
    """Local experts, but under tensor parallelism this rank routes only a slice of each sequence's tokens."""

    def __init__(self, tokens: TokenSlices) -> None:
        self.tokens = tokens

    def own(self, x_BT: Tensor) -> Tensor:
        return self.tokens.own(x_BT)

    def whole(self, x_BTK: Tensor) -> Tensor:
        return x_BTK if self.tokens.size == 1 else self.tokens.all_gather(x_BTK)

    def total(self, *statistics: Tensor) -> tuple[Tensor, ...]:
        return statistics if self.tokens.size == 1 else _SumForward.apply(self.tokens.group, *statistics)


class Route:
    """The way of one batch's tokens through one layer: hop by hop to the ranks of their experts, and there by expert.

    partials: the dtype in which the parts of a token's sum travel. What a pass over it starts, a later one takes up.
    """

    def __init__(self, assigned: Assigned, hops: Sequence[MakeHop], partials: torch.dtype, n_local: int) -> None:
        first, *self._further = hops
        self._hops, self._partials, self._n_local = [first(assigned)], partials, n_local
        self._arrived: Assigned | None = None
        self.order: Order | None = None
        self._rows: Pending | None = None
        self._gates: Pending | None = None

    def start(self, x_ND: Tensor) -> None:
        """Tokens leave."""
        self._rows = self._hops[0].there(x_ND)

    def arrive(self) -> Tensor:
        """Rows for this rank's experts, ordered by expert, [M, D]."""
        assert self._rows
        if self.order is None:
            self._arrived = self._hops[0].arrived()
            for make in self._further:
                self._hops.append(make(self._arrived))
                self._arrived = self._hops[-1].arrived()
            self.order = by_expert(self._arrived, self._n_local)
        x_QD = self._rows()
        for hop in self._hops[1:]:
            x_QD = hop.there(x_QD)()
        self._rows = None
        return x_QD.index_select(0, self.order.row_M)

    def leave(self, rows_MD: Tensor, *, weighted: bool) -> None:
        """Each token's sum over this rank's experts leaves for home."""
        assert self.order and self._arrived
        gate_A = self._arrived.gate_A if weighted else None
        parts_QD = summed(rows_MD.to(self._partials), self.order.place_A, self._arrived.starts_R1, gate_A)
        for hop in self._hops[:0:-1]:
            parts_QD = hop.back(parts_QD)()
        self._rows = self._hops[0].back(parts_QD)

    def home(self) -> Tensor:
        """Each token's sum over all its experts, [N, D]."""
        assert self._rows
        found, self._rows = self._rows(), None
        return found

    def gate_M(self) -> Tensor:
        assert self.order and self._arrived
        return self._arrived.gate_A.index_select(0, self.order.order_M)

    def leave_gates(self, of_gate_M: Tensor) -> None:
        """The gates' gradients leave for home."""
        assert self.order
        of_gate_A = of_gate_M.index_select(0, self.order.place_A)
        for hop in self._hops[:0:-1]:
            of_gate_A = hop.scalars_back(of_gate_A)()
        self._gates = self._hops[0].scalars_back(of_gate_A)

    def gates_home(self) -> Tensor:
        assert self._gates
        found, self._gates = self._gates(), None
        return found


class _Start(torch.autograd.Function):
    """Tokens leave: what is computed between this and `_Arrive` does not wait for them, nor for their gradients, which
    are on their way home meanwhile. The ticket, an empty tensor, ties the two.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gate_A: Tensor, route: Route) -> Tensor:
        ctx.route, ctx.dtype = route, x_ND.dtype
        route.start(x_ND)
        return x_ND.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return ctx.route.home().to(ctx.dtype), ctx.route.gates_home(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return route.arrive()

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.route.leave(grad_MD, weighted=False)
        return grad_MD.new_empty(0), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, route: Route) -> Tensor:
        ctx.route = route
        ctx.save_for_backward(rows_MD)
        route.leave(rows_MD, weighted=True)
        return route.home().to(rows_MD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (rows_MD,), route = ctx.saved_tensors, ctx.route
        route.start(grad_ND)
        grad_MD, of_gate_M = combine_gradients(route.arrive(), rows_MD, route.gate_M())
        route.leave_gates(of_gate_M)
        return grad_MD, None


class ExpertDispatcher(SequenceSlice):
    """Experts spread over the `ep` mesh: rank p holds the p-th run of neighbouring experts. What is dropped stays home.

    A rank that sends or receives nothing still takes part in every exchange.
    """

    def __init__(self, tokens: TokenSlices, ep: DeviceMesh, partials: torch.dtype) -> None:
        super().__init__(tokens)
        self._group, self._partials, self.traffic = ep.get_group(), partials, Traffic()

    def send(self, x_ND: Tensor, assigned: Assigned, n_experts: int) -> tuple[Tensor, Route]:
        held = n_experts // self._group.size()
        hops = [partial(AllToAll, held=held, group=self._group, traffic=self.traffic)]
        # What goes where was found with the first pass over a layer, if there is a second one.
        route = once(lambda: Route(assigned, hops, torch.promote_types(self._partials, x_ND.dtype), held))
        return _Start.apply(x_ND, assigned.gate_A, route), route

    def receive(self, sent: tuple[Tensor, Route]) -> tuple[Tensor, Tensor]:
        rows_MD: Tensor = _Arrive.apply(*sent)
        order = sent[1].order
        assert order
        return rows_MD, order.counts_E

    def combine(self, rows_MD: Tensor, sent: tuple[Tensor, Route]) -> Tensor:
        combined: Tensor = _Combine.apply(rows_MD, sent[1])
        return combined


def apply_expert_parallel(decoder: Decoder, meshes: Meshes) -> None:
    """Splits every MoE layer's experts over the `ep` mesh and gives it the dispatcher that reaches them."""
    tokens = TokenSlices(meshes.tp)
    for module in decoder.modules():
        if not isinstance(module, MoE):
            continue
        if meshes.ep.size() == 1:
            module.dispatcher = SequenceSlice(tokens)
            continue
        module.dispatcher = ExpertDispatcher(tokens, meshes.ep, torch.float32)
        for name, weight in list(module.experts.named_parameters()):
            split: DTensor = distribute_tensor(weight, meshes.ep, [Shard(0)], src_data_rank=None)
            setattr(module.experts, name, nn.Parameter(split))


class _SumForward(torch.autograd.Function):
    """Sums over a group going forward, all in one exchange. Backward is the identity: every peer holds the same loss of
    the sum, and its own part of the gradient is what that loss says of its own summand; the weights' gradients are
    summed later.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *parts: Tensor) -> tuple[Tensor, ...]:
        sums = torch.cat([x.flatten() for x in parts])
        dist.all_reduce(sums, group=group)
        pieces = sums.split([x.numel() for x in parts])
        # FSDP warns of modules that return views.
        return tuple(piece.view_as(x).clone() for piece, x in zip(pieces, parts, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *grads
