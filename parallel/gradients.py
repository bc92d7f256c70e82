"""Gradients of the global batch: sums divided by global counts, and their norm over mixed meshes (law 1)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moray.model.decoder import Decoder
from moray.model.moe.balance import updated_bias
from moray.model.moe.layer import MoE
from moray.model.objective import NextToken, Objective, Piece
from moray.model.sharded import local
from moray.parallel.exact import exact_squares
from moray.parallel.reduction import Reduction
from moray.parallel.witness import Witness


@dataclass(frozen=True)
class GlobalLosses:
    """Of one global batch. values: each of the objective's sums by its count, under its name.

    tokens: those that teach. flops: what its micro-batches said that they ask for. own_MX (fp64): what this rank itself
    computed for each of its M micro-batches: the X - 1 sums, and its witness's checksum of the gradient, or 0.
    """

    values: dict[str, float]
    tokens: int
    flops: float
    own_MX: Tensor

    @property
    def loss(self) -> float:
        """The loss proper, without what is added to it."""
        return next(iter(self.values.values()))


def accumulate_gradients(
    decoder: Decoder,
    micro_batches: Sequence[Piece],
    reduction: Reduction | None = None,
    witness: Witness | None = None,
    of: Sequence[Piece] | None = None,
    objective: Objective[Any] | None = None,
) -> GlobalLosses:
    """Adds the gradient of the global batch's loss to every parameter, and returns that loss.

    The loss is the objective's (by default NextToken), whatever ranks and micro-batches the batch is spread over;
    without a `reduction`, this process is alone. `of` are this rank's micro-batches of the global batch, where these
    are not they. Collective.
    """
    learnt: Objective[Any] = objective or NextToken.of(decoder.config)
    tp = reduction.tp if reduction else 1
    # Tensor-parallel peers hold the same sequences.
    held = [(batch.n_targets, batch.flops, *learnt.counts(batch)) for batch in of or micro_batches]
    tokens, flops, *counts = (world_sum(torch.tensor(held, dtype=torch.float64).sum(0)) / tp).tolist()
    # A batch without a single target has loss 0, not 0/0.
    weights = [1 / count if count else 1.0 for count in counts]
    own = []
    for i, batch in enumerate(micro_batches):
        if reduction:
            reduction.begin(is_last=i == len(micro_batches) - 1)
        sums = learnt.sums(decoder, batch)
        loss = torch.stack([total * weight for total, weight in zip(sums, weights, strict=True)]).sum()
        loss.backward()
        checksum = witness.take() if witness else torch.zeros_like(loss, dtype=torch.float64)
        own.append(torch.stack([*(part.detach().double() for part in sums), checksum]))
    if reduction:
        reduction.finish()
    own_MX = torch.stack(own)
    totals = [total / tp for total in _world_totals(own_MX[:, :-1])]
    values = {n: total * weight for n, total, weight in zip(learnt.names, totals, weights, strict=True)}
    return GlobalLosses(values, int(tokens), flops, own_MX)


@torch.no_grad()
def evaluate(
    decoder: Decoder, micro_batches: Iterable[Piece], objective: Objective[Any] | None = None
) -> dict[str, tuple[float, float]]:
    """The objective's sums, and their counts, over all ranks' micro-batches, which must be equally many. Collective."""
    learnt: Objective[Any] = objective or NextToken.of(decoder.config)
    decoder.eval()
    own = [[*(total.item() for total in learnt.sums(decoder, batch)), *learnt.counts(batch)] for batch in micro_batches]
    forget_counts(decoder)  # what travelled here is no step's
    n = len(learnt.names)
    # Tensor-parallel peers count the same, above and below the line.
    found = _world_totals(torch.tensor(own, dtype=torch.float64).view(-1, 2 * n))
    return {name: (found[i], found[n + i]) for i, name in enumerate(learnt.names)}


def world_sum(values: Tensor) -> Tensor:
    """The sum of each value over all ranks; on the values' device, so that host values keep no device waiting."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def of_all_ranks(value: float) -> list[float]:
    """What each rank has, in their order. Collective."""
    found = [torch.tensor(value, dtype=torch.float64)]
    if dist.is_initialized():
        found = [torch.empty_like(found[0]) for _ in range(dist.get_world_size())]
        dist.all_gather(found, torch.tensor(value, dtype=torch.float64))
    return [one.item() for one in found]


def _world_totals(own_NX: Tensor) -> list[float]:
    """The sum of each column over the rows of all ranks, which have equally many: rounded once, so in any order."""
    found = [own_NX]
    if dist.is_initialized():
        found = [torch.empty_like(own_NX) for _ in range(dist.get_world_size())]
        dist.all_gather(found, own_NX.contiguous())
    columns = torch.cat(found).t().tolist()
    return [math.fsum(column) if all(map(math.isfinite, column)) else sum(column) for column in columns]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, *, exact: bool = False) -> float:
    """Scales all gradients so that their joint norm is at most `max_norm`; returns the norm before. Collective.

    exact: the norm has the same bits on every layout, at the price of more passes over the gradients.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    held = [local(gradient) for gradient in gradients]
    norm = math.sqrt(exact_squares(gradients) if exact else _squares(gradients))
    # The 1e-6 is that of torch.nn.utils.clip_grad_norm_.
    if (scale := max_norm / (norm + 1e-6)) < 1 or math.isnan(scale):
        torch._foreach_mul_(held, scale)
    return norm


def _squares(gradients: Sequence[Tensor]) -> float:
    """The sum of all gradients' squares. What each rank holds is summed over the world in one exchange, whatever meshes
    the gradients are on: a shard that several ranks hold alike counts from each for its part.
    """
    held = [local(gradient) for gradient in gradients]
    shares = torch.tensor([1 / _n_holders(gradient) for gradient in gradients], dtype=torch.float64)
    # In fp32 a sum of millions of squares loses five digits, other ones on every layout.
    squares = torch.stack(torch._foreach_norm(held, 2, torch.float64)).square()
    total: float = world_sum((squares * shares.to(squares.device, non_blocking=True)).sum()).item()
    return total


def _n_holders(gradient: Tensor) -> int:
    """How many ranks of the world hold the same part of a tensor."""
    if not isinstance(gradient, DTensor):
        return dist.get_world_size() if dist.is_initialized() else 1
    mesh = gradient.device_mesh
    shards = [mesh.size(dim) for dim, placement in enumerate(gradient.placements) if not placement.is_replicate()]
    return dist.get_world_size() // prod(shards)


def drop_gradients(decoder: Decoder) -> None:
    """Undoes what passes forward and backward have left: gradients, and counts of routed tokens."""
    decoder.zero_grad()
    forget_counts(decoder)


def forget_counts(decoder: Decoder) -> None:
    """Undoes what a forward pass has counted."""
    for module in decoder.modules():
        if isinstance(module, MoE):
            module.forget_counts()


class ExpertLoad(NamedTuple):
    """Of one global batch, on the CPU (fp64): tokens that chose each expert, and any of each device's experts (those of
    a token on one device count each); choices that found theirs full; mean squared log-sum-exp of the routers' logits;
    tokens that each device got from others, and bytes of all that came to it for them, there and back, both passes.

    Shapes: [MoE layers], with E experts, or P devices that share them.
    """

    tokens_LE: Tensor
    devices_LP: Tensor
    dropped_L: Tensor
    z_L: Tensor
    rows_LP: Tensor
    bytes_LP: Tensor


@torch.no_grad()
def update_routing_bias(decoder: Decoder) -> ExpertLoad | None:
    """Moves every MoE layer's routing bias by the global batch's token counts, and starts the counts anew.

    Returns the counts, or None for a dense model. Collective; once per optimizer step.
    Source: DeepSeek-V3, section 2.1.2.
    """
    layers = [module for module in decoder.modules() if isinstance(module, MoE)]
    if not layers:
        return None
    counts_LX = torch.stack([_counts(layer) for layer in layers])
    sizes = (layers[0].moe.n_experts, 1, 2, counts_LX.shape[1] - layers[0].moe.n_experts - 3)
    tokens_LE, dropped_L1, z_L2, traffic_LX = world_sum(counts_LX).split(sizes, dim=1)
    for layer, tokens_E in zip(layers, tokens_LE, strict=True):
        layer.router.bias_E.copy_(updated_bias(layer.router.bias_E, tokens_E, layer.moe))
        layer.forget_counts()
    tokens_LE, (z_L, routed_L) = tokens_LE.cpu(), z_L2.cpu().unbind(1)
    devices_LP = torch.stack([_of_devices(layer, x) for layer, x in zip(layers, tokens_LE, strict=True)])
    rows_LP, bytes_LP = traffic_LX.cpu().unflatten(1, (2, -1)).unbind(1)
    return ExpertLoad(tokens_LE, devices_LP, dropped_L1[:, 0].cpu(), z_L / routed_L.clamp(min=1), rows_LP, bytes_LP)


def _of_devices(layer: MoE, tokens_E: Tensor) -> Tensor:
    if layer.slots_E is not None:
        tokens_E = torch.empty_like(tokens_E).index_copy_(0, layer.slots_E.cpu(), tokens_E)
    return layer.dispatcher.of_devices(tokens_E)


def _counts(layer: MoE) -> Tensor:
    """All that a layer has counted on this rank, as one tensor (fp64)."""
    own = (layer.tokens_E.double(), layer.dropped[None].double(), layer.z_2)
    return torch.cat((*own, layer.dispatcher.traffic().flatten().to(layer.z_2.device, non_blocking=True)))
