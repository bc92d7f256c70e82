"""Gradients of the global batch: sums divided by global counts, and their norm over mixed meshes (law 1)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moray.model import Documents, Randomness
from moray.model.decoder import IGNORED, Decoder
from moray.model.moe.balance import updated_bias
from moray.model.moe.layer import MoE
from moray.model.sharded import local
from moray.parallel.exact import exact_squares
from moray.parallel.reduction import Reduction
from moray.parallel.witness import Witness


@dataclass(frozen=True)
class MicroBatch:
    """Tensors [B, T] of one forward pass on the model's device, and what the host must know of them.

    flops: what it asks of the model, where somebody wants to know of the global batch's.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor
    documents: Documents
    n_targets: int
    randomness: Randomness | None = None
    flops: float = 0.0

    @classmethod
    def of(
        cls,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        positions_BT: Tensor,
        documents_BT: Tensor,
        device: torch.device,
        randomness: Randomness | None = None,
        flops: float = 0.0,
    ) -> Self:
        """From tensors on the CPU: what is counted here costs no wait for the device later."""
        return cls(
            tokens_BT.to(device, non_blocking=True),
            targets_BT.to(device, non_blocking=True),
            positions_BT.to(device, non_blocking=True),
            Documents.of(documents_BT, device),
            int((targets_BT != IGNORED).sum()),
            randomness,
            flops,
        )


@dataclass(frozen=True)
class GlobalLosses:
    """Of one global batch: cross-entropy and output z-loss per valid token, auxiliary loss per routing group.

    tokens: the valid ones. flops: what its micro-batches said that they ask for. own_M4 (fp64): what this rank itself
    computed for each of its M micro-batches: the sums of cross-entropy, z-loss and auxiliary loss, and its witness's
    checksum of the gradient, or 0.
    """

    cross_entropy: float
    z: float
    auxiliary: float
    tokens: int
    flops: float
    own_M4: Tensor


def accumulate_gradients(
    decoder: Decoder,
    micro_batches: Sequence[MicroBatch],
    reduction: Reduction | None = None,
    witness: Witness | None = None,
    of: Sequence[MicroBatch] | None = None,
) -> GlobalLosses:
    """Adds the gradient of the global batch's loss to every parameter, and returns that loss.

    The loss is sum(cross-entropy + z) / (valid tokens of the global batch) + sum(auxiliary) / (its routing groups),
    whatever ranks and micro-batches the batch is spread over; without a `reduction`, this process is alone. `of` are
    this rank's micro-batches of the global batch, where these are not they. Collective.
    """
    config, tp = decoder.config, reduction.tp if reduction else 1  # peers that hold the same sequences
    held = [(batch.n_targets, len(batch.tokens_BT), batch.flops) for batch in of or micro_batches]
    tokens, sequences, flops = (world_sum(torch.tensor(held, dtype=torch.float64).sum(0)) / tp).tolist()
    # A batch without a single target has loss 0, not 0/0.
    group_size = config.moe.group_size if config.moe else 1
    per_token, per_group = 1 / max(tokens, 1), group_size / sequences
    own = []
    for i, batch in enumerate(micro_batches):
        if reduction:
            reduction.begin(is_last=i == len(micro_batches) - 1)
        losses = decoder.loss(batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents, batch.randomness)
        loss = (losses.cross_entropy + losses.z) * per_token + losses.auxiliary * per_group
        loss.backward()
        checksum = witness.take() if witness else torch.zeros_like(loss, dtype=torch.float64)
        own.append(torch.stack([*(part.detach().double() for part in losses), checksum]))
    if reduction:
        reduction.finish()
    own_M4 = torch.stack(own)
    cross_entropy, z, auxiliary = (total / tp for total in _world_totals(own_M4[:, :3]))
    return GlobalLosses(cross_entropy * per_token, z * per_token, auxiliary * per_group, int(tokens), flops, own_M4)


@torch.no_grad()
def evaluate(decoder: Decoder, micro_batches: Iterable[MicroBatch]) -> float:
    """Mean cross-entropy per valid token of all ranks' micro-batches, which must be equally many. Collective."""
    decoder.eval()
    own = []
    for batch in micro_batches:
        losses = decoder.loss(batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents)
        own.append([losses.cross_entropy.item(), batch.n_targets])
    _forget_counts(decoder)  # what travelled here is no step's
    # Tensor-parallel peers count the same tokens, above and below the line.
    cross_entropy, tokens = _world_totals(torch.tensor(own, dtype=torch.float64).view(-1, 2))
    return cross_entropy / max(tokens, 1)


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
    _forget_counts(decoder)


def _forget_counts(decoder: Decoder) -> None:
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
