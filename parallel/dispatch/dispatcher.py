"""Dispatchers for experts, and for tokens of a sequence, that are spread over ranks."""

# Shapes: B sequences, T tokens of each on this rank, N = B * T, K experts per token, M rows of this rank's experts,
# D model width.

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moray.model.moe.dispatch import Assigned, LocalDispatcher
from moray.model.recompute import once
from moray.parallel.dispatch.kinds import HOPS, Kind
from moray.parallel.dispatch.route import Arrive, Combine, Route, Start
from moray.parallel.dispatch.wire import Traffic, Wire
from moray.parallel.tensor import TokenSlices


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


class ExpertDispatcher(SequenceSlice):
    """Experts spread over ranks: each has a run of neighbouring ones, in the order of the ranks.

    A rank that sends or receives nothing still takes part in every exchange. What is dropped stays home.
    """

    def __init__(
        self, tokens: TokenSlices, groups: Sequence[dist.ProcessGroup], kind: Kind, partials: torch.dtype
    ) -> None:
        """groups: those that tokens travel through, one after the other: all ranks with experts, or between nodes and
        then within one. partials: the dtype in which parts of a token's sum travel.
        """
        super().__init__(tokens)
        self._hop, self._partials, self._traffic = HOPS[kind], partials, Traffic()
        self._wires = [Wire(group, self._traffic) for group in groups]
        self._place, self._devices = 0, 1
        for wire in self._wires:
            self._place = self._place * wire.ranks + wire.rank
            self._devices *= wire.ranks

    def send(self, x_ND: Tensor, assigned: Assigned, n_experts: int) -> tuple[Tensor, Route]:
        hops, held = [], n_experts
        for wire in self._wires:
            held //= wire.ranks
            hops.append(partial(self._hop, held=held, wire=wire))
        found = replace(assigned, gate_A=assigned.gate_A.detach())
        # What goes where was found with the first pass over a layer, if there is a second one.
        route = once(lambda: Route(found, hops, self._partials, held))
        ticket: Tensor = Start.apply(x_ND, assigned.gate_A, route)
        return ticket, route

    def receive(self, sent: tuple[Tensor, Route]) -> tuple[Tensor, Tensor]:
        rows_MD: Tensor = Arrive.apply(*sent)
        return rows_MD, sent[1].order.counts_E

    def combine(self, rows_MD: Tensor, sent: tuple[Tensor, Route]) -> Tensor:
        combined: Tensor = Combine.apply(rows_MD, sent[1])
        return combined

    def of_devices(self, tokens_E: Tensor) -> Tensor:
        return tokens_E.unflatten(0, (self._devices, -1)).sum(1)

    def traffic(self) -> Tensor:
        found_2P = torch.zeros(2, self._devices, dtype=torch.float64)
        found_2P[:, self._place] = torch.tensor([self._traffic.rows, self._traffic.bytes])
        return found_2P

    def forget_traffic(self) -> None:
        self._traffic.forget()


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
