"""Gradients of the global batch: sums divided by global counts, and their norm over mixed meshes (law 1)."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from model.decoder import IGNORED, Decoder
from model.moe import MoE, updated_bias


@dataclass(frozen=True)
class MicroBatch:
    """Tensors [B, T] of one forward pass, as Decoder.loss takes them."""

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor
    documents_BT: Tensor


@dataclass(frozen=True)
class GlobalLosses:
    """Of one global batch: mean cross-entropy per valid token, mean balance term per sequence (its layers summed)."""

    cross_entropy: float
    balance: float
    tokens: int


def accumulate_gradients(decoder: Decoder, micro_batches: Sequence[MicroBatch], tp: int) -> GlobalLosses:
    """Adds the gradient of the global batch's loss to every parameter, and returns that loss.

    The loss is sum(cross-entropy) / (valid tokens of the global batch) + balance_loss * sum(balance) / (its sequences),
    whatever ranks and micro-batches the batch is spread over. `tp` peers hold the same sequences. Gradients are reduced
    over ranks once, with the last micro-batch. Collective.
    """
    config = decoder.config
    sequences = sum(len(batch.tokens_BT) for batch in micro_batches)
    valid = sum(int((batch.targets_BT != IGNORED).sum()) for batch in micro_batches)
    tokens, all_sequences = (int(x) // tp for x in world_sum([valid, sequences], decoder))
    # A batch without a single target has loss 0, not 0/0.
    per_token, per_balance = 1 / max(tokens, 1), 1 / all_sequences
    sums = torch.zeros(2, dtype=torch.float64)
    for i, batch in enumerate(micro_batches):
        if isinstance(decoder, FSDPModule):
            decoder.set_requires_gradient_sync(i == len(micro_batches) - 1)
        losses = decoder.loss(batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents_BT)
        loss = losses.cross_entropy * per_token
        if config.n_moe_layers and config.balance_loss:
            loss = loss + losses.balance * (config.balance_loss * per_balance)
        loss.backward()
        sums += torch.stack((losses.cross_entropy.detach(), losses.balance.detach())).double().cpu()
    cross_entropy, balance = (world_sum(sums.tolist(), decoder) / tp).tolist()
    return GlobalLosses(cross_entropy * per_token, balance * per_balance, tokens)


@torch.no_grad()
def evaluate(decoder: Decoder, micro_batches: Iterable[MicroBatch]) -> float:
    """Mean cross-entropy per valid token of all ranks' micro-batches, which must be equally many. Collective."""
    decoder.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in micro_batches:
        losses = decoder.loss(batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents_BT)
        sums += torch.stack((losses.cross_entropy, (batch.targets_BT != IGNORED).sum())).double().cpu()
    # Tensor-parallel peers count the same tokens, above and below the line.
    cross_entropy, tokens = world_sum(sums.tolist(), decoder).tolist()
    return cross_entropy / max(tokens, 1)


def world_sum(values: Sequence[float], decoder: Decoder) -> Tensor:
    """The sum of each value over all ranks, in float64 on the CPU. Collective."""
    device = next(decoder.parameters()).device
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.cpu()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scales all gradients so that their joint norm is at most `max_norm`; returns the norm before.

    Parameters on different meshes cannot share one norm call: each mesh's norm is taken in full, then combined.
    """
    by_mesh: dict[object, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh[mesh].append(parameter.grad)
    norms = [_full(torch.nn.utils.get_total_norm(gradients)) for gradients in by_mesh.values()]
    total = torch.linalg.vector_norm(torch.stack(norms))
    # The 1e-6 is that of torch.nn.utils.clip_grad_norm_.
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for gradients in by_mesh.values():
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], scale)
    return total.item()


def _full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def update_routing_bias(decoder: Decoder) -> Tensor | None:
    """Moves every MoE layer's routing bias by the global batch's token counts, and starts the counts anew.

    Returns the counts, [MoE layers, E] (int64, on the CPU), or None for a dense model. Collective; once per optimizer
    step. Source: DeepSeek-V3, section 2.1.2.
    """
    layers = [module for module in decoder.modules() if isinstance(module, MoE)]
    if not layers:
        return None
    tokens_LE = torch.stack([layer.tokens_E for layer in layers])
    if dist.is_initialized():
        dist.all_reduce(tokens_LE)
    for layer, tokens_E in zip(layers, tokens_LE, strict=True):
        layer.router.bias_E.copy_(updated_bias(layer.router.bias_E, tokens_E, decoder.config.bias_update_rate))
        layer.tokens_E.zero_()
    return tokens_LE.cpu()
