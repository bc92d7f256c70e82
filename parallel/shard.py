"""Builds a decoder over the meshes: tensor parallel, expert parallel, then FSDP2 (HSDP) around each block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
from torch.distributed.fsdp._fully_shard._fsdp_init import _get_mesh_info
from torch.distributed.tensor import DTensor, Shard

from moray.model import ModelConfig
from moray.model.decoder import Decoder
from moray.model.init import initial_tensor
from moray.model.lora import LoRA, add_adapters, without_balancing
from moray.model.moe.experts import Experts
from moray.model.moe.layer import MoE, Router
from moray.model.recompute import Recompute
from moray.model.sharded import local
from moray.model.tensors import Read, tensor_shapes
from moray.parallel.expert import apply_expert_parallel
from moray.parallel.held import held_chunk
from moray.parallel.layout import Meshes
from moray.parallel.reduction import Stage
from moray.parallel.summing import sum_by_all_to_all
from moray.parallel.tensor import apply_tensor_parallel


def build_decoder(
    config: ModelConfig,
    meshes: Meshes,
    *,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    stage: Stage = 3,
    recompute: Recompute = "none",
    lora: LoRA | None = None,
    frozen: bool = False,
) -> Decoder:
    """A decoder spread over the meshes, whose weights `initialise_shards` or a checkpoint must fill.

    With `lora`, only adapters learn: the rest is frozen, and what would balance the load of its experts is off. Of a
    `frozen` decoder, nothing learns.

    `dtype` is that of the weights that learn, gradients and reductions, `compute_dtype` that of the products (bf16 or
    the same).
    Between steps no rank holds more than its own shard; within one, `stage` decides, and `recompute` what is kept of
    activations. Collective.
    """
    with torch.device("meta"):
        decoder = Decoder(config if lora is None else without_balancing(config), recompute)
        if lora:
            add_adapters(decoder, lora)
        elif frozen:
            decoder.requires_grad_(False)
        decoder.to(dtype)
        _round_frozen(decoder, compute_dtype)
    if meshes.tp.size() > 1:
        apply_tensor_parallel(decoder, meshes.tp)
    apply_expert_parallel(decoder, meshes, compute_dtype)
    _shard(decoder, meshes, dtype, compute_dtype, stage)
    decoder.to_empty(device=meshes.dense.device_type)
    for module in decoder.modules():
        if isinstance(module, MoE):
            module.forget_counts()
            module.router.bias_E.zero_()
    return decoder


def _round_frozen(decoder: Decoder, compute_dtype: torch.dtype) -> None:
    """What never changes is held as products read it: rounded once instead of with every use, to the same bits."""
    for name, weight in decoder.named_parameters():
        if not weight.requires_grad and ".router." not in name:
            weight.data = weight.data.to(compute_dtype)


def _shard(decoder: Decoder, meshes: Meshes, dtype: torch.dtype, compute_dtype: torch.dtype, stage: Stage) -> None:
    """FSDP2, with experts on the sparse mesh, what tensor parallelism has left whole on the flat one, and routers in
    `dtype` whatever the products' dtype.
    """
    dense, sparse = _over(meshes.dense, "dp_shard"), _over(meshes.sparse, "efsdp")
    flat = _over(meshes.flat, "dp_shard_tp") if meshes.flat else dense
    experts: list[nn.Module] = [module for module in decoder.modules() if isinstance(module, Experts)]
    routers: list[nn.Module] = [module for module in decoder.modules() if isinstance(module, Router)]
    of_experts = {weight for module in experts for weight in module.parameters()}
    others = {weight for weight in decoder.parameters() if weight not in of_experts}
    undivided = {weight for weight in others if meshes.flat and not isinstance(weight, DTensor)}
    efsdp, dp_shard = meshes.sparse["efsdp"].size(), meshes.dense["dp_shard"].size()
    # What a rank holds whole and need not cast stays as it is: FSDP would only copy weights and gradients.
    ignored: set[nn.Parameter] = set()
    if stage == 1 or meshes.dense["dp_replicate"].size() == 1:
        whole = (of_experts if efsdp == 1 else set()) | (others - undivided if dp_shard == 1 else set())
        ignored = {weight for weight in whole if weight.dtype == compute_dtype}
    if len(ignored) == len(of_experts | others):
        return
    on_flat = cast(FSDPMeshInfo, _get_mesh_info(flat))

    def place(weight: nn.Parameter) -> Shard | ShardPlacementResult | None:
        if weight in of_experts:
            return _expert_split(weight, efsdp)
        return ShardPlacementResult(None, on_flat) if weight in undivided else None

    def wrap(modules: list[nn.Module], mesh: DeviceMesh, products: torch.dtype, reshard: bool) -> None:
        """In stage 1 as one, for there are to be as few exchanges as there are meshes and dtypes."""
        policy = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=dtype)
        rest: dict[str, Any] = {"mp_policy": policy, "shard_placement_fn": place, "ignored_params": ignored}
        for module in [modules] if stage == 1 and len(modules) > 1 else modules:
            fully_shard(module, mesh=mesh, reshard_after_forward=stage == 3 and reshard, **rest)  # type: ignore

    # Where one rank holds all the weights, freeing and copying them again would be work for nothing.
    if not of_experts <= ignored:
        wrap(experts, sparse, compute_dtype, efsdp > 1)
    if compute_dtype != dtype:
        wrap(routers, flat, dtype, dp_shard > 1)
    if stage == 3:
        wrap([*decoder.blocks], dense, compute_dtype, dp_shard > 1)
    wrap([decoder], dense, compute_dtype, False)
    for entry in ("loss", "logprobs", "with_head", "likeliest", "score", "values", "sample"):
        register_fsdp_forward_method(decoder, entry)
    for module in decoder.modules():
        # A lone rank's sum is its mean, and dividing by 1 would be a pass over all gradients.
        if isinstance(module, FSDPModule) and meshes.dense.size() > 1:
            # Losses are already divided by the global token count: gradients are sums over all ranks, not means.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
            if meshes.dense.device_type == "cpu":
                sum_by_all_to_all(module)


def _over(mesh: DeviceMesh, shards: str) -> DeviceMesh:
    return mesh["dp_replicate", shards] if mesh["dp_replicate"].size() > 1 else mesh[shards]


def _expert_split(weight: nn.Parameter, ranks: int) -> Shard:
    """By expert where that divides evenly, else by width, so that no rank is left without a share."""
    held, width, *_ = local(weight).shape
    return Shard(1) if held % ranks and width % ranks == 0 else Shard(0)


def on_own_gradients(decoder: Decoder, do: Callable[[nn.Parameter, Tensor], None]) -> None:
    """Calls `do(parameter, whole)` whenever a backward pass has made the gradient of a weight, before it is reduced. Of
    what is frozen there is none.

    `whole` is the weight as this rank computes with it, whose `grad` is the rank's own: the gathered one under FSDP,
    whose parameters' gradients are sums over all ranks. Collective.
    """
    plain = dict.fromkeys(decoder.parameters())
    for module in [module for module in decoder.modules() if isinstance(module, FSDPModule)]:
        shards = dict(module.named_parameters())
        module.unshard()
        for name, whole in module.named_parameters():
            if whole is not shards[name]:
                plain.pop(shards[name], None)
                if whole.requires_grad:
                    whole.register_post_accumulate_grad_hook(partial(do, shards[name]))
        module.reshard()
    for parameter in [parameter for parameter in plain if parameter.requires_grad]:
        parameter.register_post_accumulate_grad_hook(partial(do, parameter))


@contextmanager
def gathered(decoder: Decoder) -> Iterator[None]:
    """Within, this rank has all that it computes with, and no forward pass gathers or frees a weight. Collective."""
    sharded = [module for module in decoder.modules() if isinstance(module, FSDPModule)]
    reshards = [any(g._reshard_after_forward for g in m._get_fsdp_state()._fsdp_param_groups) for m in sharded]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module, does_reshard in zip(sharded, reshards, strict=True):
            module.reshard()
            module.set_reshard_after_forward(does_reshard, recurse=False)


@torch.no_grad()
def initialise_shards(decoder: Decoder, seed: int) -> None:
    """Fills this rank's part of every weight that learns with what (config, seed) define for every layout."""
    for name, parameter in decoder.named_parameters():
        if not parameter.requires_grad:
            continue
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
