"""Expert parallelism: tokens travel to the ranks that hold their experts, by all-to-all, and back.

route -> sort by expert -> exchange counts -> exchange rows -> grouped products -> exchange back -> weighted sum
"""

# Shapes: N tokens on this rank, K experts per token, M rows that leave (N * K but for those dropped), R rows that
# arrive, D model width, E experts, e experts of this rank, P expert-parallel ranks.

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moray.model.decoder import Decoder
from moray.model.moe.dispatch import LocalDispatcher, Permute, Sorted, invert, sort_by_expert, unsort
from moray.model.moe.layer import MoE
from moray.parallel.layout import Meshes
from moray.parallel.tensor import Exchange, TokenSlices


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


@dataclass(frozen=True)
class Journey:
    """What brings rows home: how they were sorted here, how many went where, and how they were sorted there."""

    plan: Sorted
    sent_P: list[int]
    received_P: list[int]
    order_R: Tensor
    inverse_R: Tensor


class AllToAllDispatcher(SequenceSlice):
    """Experts spread over the `ep` mesh: rank p holds the p-th run of neighbouring experts. What is dropped stays home.

    A rank that sends or receives nothing still takes part in every exchange.
    """

    def __init__(self, tokens: TokenSlices, ep: DeviceMesh) -> None:
        super().__init__(tokens)
        self.group, self.size = ep.get_group(), ep.size()

    def dispatch(  # type: ignore[override]
        self, x_ND: Tensor, chosen_NK: Tensor, kept_NK: Tensor | None, n_experts: int
    ) -> tuple[Tensor, Tensor, Journey]:
        plan = sort_by_expert(x_ND, chosen_NK, kept_NK, n_experts)
        arriving_E = torch.empty_like(plan.counts_E)
        dist.all_to_all_single(arriving_E, plan.counts_E, group=self.group)
        arriving_Pe = arriving_E.view(self.size, -1)
        # A wait for the device: the exchange needs its sizes on the host.
        sent_P, received_P = torch.stack((plan.counts_E.view(self.size, -1).sum(1), arriving_Pe.sum(1))).tolist()
        rows_RD = Exchange.apply(plan.rows_MD, *self._ways(sent_P, received_P))
        # Rows arrive ordered by (source rank, expert); the grouped product wants them by expert.
        expert_R = torch.arange(arriving_Pe.shape[1], device=x_ND.device).repeat(self.size)
        order_R = expert_R.repeat_interleave(arriving_E, output_size=sum(received_P)).argsort(stable=True)
        inverse_R = invert(order_R)
        journey = Journey(plan, sent_P, received_P, order_R, inverse_R)
        return Permute.apply(rows_RD, order_R, inverse_R), arriving_Pe.sum(0), journey

    def combine(self, rows_RD: Tensor, journey: Journey, gates_NK: Tensor) -> Tensor:  # type: ignore[override]
        rows_RD = Permute.apply(rows_RD, journey.inverse_R, journey.order_R)
        rows_MD = Exchange.apply(rows_RD, *self._ways(journey.received_P, journey.sent_P))
        return unsort(rows_MD, journey.plan, gates_NK)

    def _ways(self, sent_P: list[int], received_P: list[int]) -> tuple[Callable[[Tensor], Tensor], ...]:
        """There and back."""
        return partial(self._exchange, sent_P, received_P), partial(self._exchange, received_P, sent_P)

    def _exchange(self, sent_P: list[int], received_P: list[int], rows_MD: Tensor) -> Tensor:
        out_RD = rows_MD.new_empty(sum(received_P), rows_MD.shape[1])
        dist.all_to_all_single(out_RD, rows_MD.contiguous(), received_P, sent_P, group=self.group)
        return out_RD


def apply_expert_parallel(decoder: Decoder, meshes: Meshes) -> None:
    """Splits every MoE layer's experts over the `ep` mesh and gives it the dispatcher that reaches them."""
    tokens = TokenSlices(meshes.tp)
    for module in decoder.modules():
        if not isinstance(module, MoE):
            continue
        if meshes.ep.size() == 1:
            module.dispatcher = SequenceSlice(tokens)
            continue
        module.dispatcher = AllToAllDispatcher(tokens, meshes.ep)
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
