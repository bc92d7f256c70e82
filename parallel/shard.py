"""Builds a decoder over the meshes: tensor parallel, expert parallel, then FSDP2 (HSDP) around each block."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from moray.model import ModelConfig
from moray.model.decoder import Decoder
from moray.model.init import initial_tensor
from moray.model.moe.experts import Experts
from moray.model.moe.layer import MoE, Router
from moray.model.sharded import local
from moray.model.tensors import Read, tensor_shapes
from moray.parallel.expert import apply_expert_parallel
from moray.parallel.held import held_chunk
from moray.parallel.layout import Meshes
from moray.parallel.tensor import apply_tensor_parallel


def build_decoder(config: ModelConfig, meshes: Meshes, *, dtype: torch.dtype, compute_dtype: torch.dtype) -> Decoder:
    """A decoder spread over the meshes, whose weights `initialise_shards` or a checkpoint must fill.

    `dtype` is that of the weights, gradients and reductions, `compute_dtype` that of the products (bf16 or the same).
    No rank ever holds more than its own shard. Collective.
    """
    with torch.device("meta"):
        decoder = Decoder(config).to(dtype)
    if meshes.tp.size() > 1:
        apply_tensor_parallel(decoder, meshes.tp)
    apply_expert_parallel(decoder, meshes)
    _shard(decoder, meshes, dtype, compute_dtype)
    decoder.to_empty(device=meshes.dense.device_type)
    for module in decoder.modules():
        if isinstance(module, MoE):
            module.forget_counts()
            module.router.bias_E.zero_()
    return decoder


def _shard(decoder: Decoder, meshes: Meshes, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    """FSDP2 with experts on the sparse mesh and routers in `dtype` whatever the products' dtype."""
    if meshes.dense.size() == 1 and compute_dtype == dtype:
        return  # nothing to share and nothing to cast: FSDP would only copy the gradients
    replicated = meshes.dense["dp_replicate"].size() > 1
    dense = meshes.dense["dp_replicate", "dp_shard"] if replicated else meshes.dense["dp_shard"]
    sparse = meshes.sparse["dp_replicate", "efsdp"] if replicated else meshes.sparse["efsdp"]
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=dtype)
    accurate = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
    # Where one rank holds all the weights, freeing and copying them again would be work for nothing.
    reshard = meshes.dense["dp_shard"].size() > 1
    for module in decoder.modules():
        if isinstance(module, Experts):
            _shard_experts(module, sparse, meshes.sparse["efsdp"].size(), policy)
        elif isinstance(module, Router):
            fully_shard(module, mesh=dense, mp_policy=accurate, reshard_after_forward=reshard)
    for block in decoder.blocks:
        fully_shard(block, mesh=dense, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(decoder, mesh=dense, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(decoder, "loss")
    for module in decoder.modules():
        # A lone rank's sum is its mean, and dividing by 1 would be a pass over all gradients.
        if isinstance(module, FSDPModule) and meshes.dense.size() > 1:
            # Losses are already divided by the global token count: gradients are sums over all ranks, not means.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _shard_experts(experts: Experts, mesh: DeviceMesh, ranks: int, policy: MixedPrecisionPolicy) -> None:
    """By expert where that divides evenly, else by width, so that no rank is left without a share."""
    held, width, d_model = local(experts.up_EFD).shape
    by_width = held % ranks and width % ranks == 0 and d_model % ranks == 0
    placement = Shard(1) if by_width else Shard(0)
    fully_shard(
        experts, mesh=mesh, mp_policy=policy, reshard_after_forward=ranks > 1, shard_placement_fn=lambda _: placement
    )


def on_own_gradients(decoder: Decoder, do: Callable[[nn.Parameter, Tensor], None]) -> None:
    """Calls `do(parameter, whole)` whenever a backward pass has made the gradient of a weight, before it is reduced.

    `whole` is the weight as this rank computes with it, whose `grad` is the rank's own: the gathered one under FSDP,
    whose parameters' gradients are sums over all ranks. Collective.
    """
    wrapped = [module for module in decoder.modules() if isinstance(module, FSDPModule)]
    for parameter in decoder.parameters() if not wrapped else ():
        parameter.register_post_accumulate_grad_hook(partial(do, parameter))
    for module in wrapped:
        shards = dict(module.named_parameters())
        module.unshard()
        for name, whole in module.named_parameters():
            if whole is not shards[name]:
                whole.register_post_accumulate_grad_hook(partial(do, shards[name]))
        module.reshard()


@torch.no_grad()
def initialise_shards(decoder: Decoder, seed: int) -> None:
    """Fills this rank's part of every weight with what (config, seed) define for every layout."""
    for name, parameter in decoder.named_parameters():
        rows, *rest = _held_box(parameter)
        if local(parameter).numel():
            values = initial_tensor(decoder.config, name, parameter.shape, seed, rows)
            local(parameter).copy_(values[(slice(None), *rest)])


@torch.no_grad()
def load_shards(decoder: Decoder, read: Read) -> None:
    """Fills this rank's part of every weight, and the routing biases, with what `read` gives, and asks for no more."""
    tensors = decoder.state_dict()
    for name in tensor_shapes(decoder.config):
        if local(tensors[name]).numel():
            local(tensors[name]).copy_(read(name, tuple(_held_box(tensors[name]))))


def _held_box(parameter: Tensor) -> list[slice]:
    """Which part of the whole tensor this rank holds."""
    return [slice(start, start + size) for start, size in zip(*held_chunk(parameter), strict=True)]
