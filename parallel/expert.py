"""Expert parallelism: each rank holds a run of every MoE layer's experts, and tokens travel to them and back."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moray.model.decoder import Decoder
from moray.model.moe.layer import MoE
from moray.parallel.dispatch.dispatcher import ExpertDispatcher, SequenceSlice
from moray.parallel.dispatch.kinds import check_kind
from moray.parallel.layout import Meshes
from moray.parallel.tensor import TokenSlices


def apply_expert_parallel(decoder: Decoder, meshes: Meshes, compute_dtype: torch.dtype) -> None:
    """Splits every MoE layer's experts over the `ep` mesh and gives it the dispatcher that reaches them.

    Raises UserError where the layout's dispatcher cannot be had here.
    """
    tokens, layout = TokenSlices(meshes.tp), meshes.layout
    if meshes.ep.size() > 1:
        check_kind(layout.dispatcher, meshes.ep.device_type, compute_dtype)
    for module in decoder.modules():
        if not isinstance(module, MoE):
            continue
        if meshes.ep.size() == 1:
            module.dispatcher = SequenceSlice(tokens)
            continue
        partials = layout.wire_dtype(meshes.ep.device_type, compute_dtype)
        module.dispatcher = ExpertDispatcher(tokens, meshes.hops, layout.dispatcher, partials)
        for name, weight in list(module.experts.named_parameters()):
            split: DTensor = distribute_tensor(weight, meshes.ep, [Shard(0)], src_data_rank=None)
            setattr(module.experts, name, nn.Parameter(split, weight.requires_grad))
