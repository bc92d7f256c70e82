"""Layers compiled by torch.compile: what lies between products and exchanges runs as few, fused kernels.

A layer's computation becomes graphs, the same ones for all layers of a kind. What cannot be in one stays outside, and
splits it: exchanges between ranks, attention where a batch's documents decide on the calls, experts where the number of
rows is any, or on CPUs.
"""

import os
import shutil
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from moray import UserError
from moray.model.attention.latent import LatentAttention
from moray.model.attention.layer import Attention
from moray.model.attention.sdpa import FLASH_DTYPES
from moray.model.block import Block
from moray.model.context import Context
from moray.model.decoder import Decoder
from moray.model.mixffn import CausalConvolution
from moray.model.moe.layer import MoE
from moray.parallel.dispatch.dispatcher import ExpertDispatcher, SequenceSlice
from moray.parallel.tensor import TokenSlices

T = TypeVar("T")
MOST_GRAPHS = 64


def compile_layers(
    decoder: Decoder, device_type: str, compute_dtype: torch.dtype, *, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compiles what each block computes, when it is first called. Losses and gradients change by rounding alone.

    A graph is of one shape, but for the number of documents: what is computed twice is computed by the same one.
    """
    # torch gives up on what has had eight graphs: kinds of layers, sizes of micro-batches, with gradients and without.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    on_gpu = device_type == "cuda"
    has_flash = on_gpu and compute_dtype in FLASH_DTYPES
    tokens = {id(module.tokens): module.tokens for module in decoder.modules() if hasattr(module, "tokens")}
    for slices in tokens.values():
        if isinstance(slices, TokenSlices):
            _leave_out(slices, "gather", "reduce", "total", "all_gather")
    for module in decoder.modules():
        if isinstance(module, Attention | LatentAttention) and not (has_flash and module.scoring.softcap is None):
            _leave_out(module, "attend")
        elif isinstance(module, CausalConvolution):
            _leave_out(module, "forward")
        elif isinstance(module, MoE):
            _leave_out_of_experts(module, on_gpu)
    compiled = partial(torch.compile, backend=backend, dynamic=False)
    for block in [module for module in decoder.modules() if isinstance(module, Block)]:
        if block.recompute != "full":
            block.compute = _of_any_documents(compiled(block.compute))  # type: ignore[method-assign,assignment]
            continue
        # Graphs of whole layers would do for layers of another kind, too, and torch may take either. What an MoE layer
        # has chosen is kept outside of graphs.
        for part in (block.attention, block.ffn):
            if not isinstance(part, MoE):
                part.forward = _of_any_documents(compiled(part.forward))  # type: ignore[method-assign]


def check_compiler() -> None:
    """Raises UserError where this machine has none to make programs of graphs."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise UserError(
            f"train.compile=true, but {socket.gethostname()} has no C++ compiler {name}: install one on every node, "
            "name it in CXX, or set train.compile=false"
        )


def _of_any_documents(compute: Callable[[Tensor, Context], T]) -> Callable[[Tensor, Context], T]:
    def computed(x_BTD: Tensor, context: Context) -> T:
        if context.documents.edges is not None:
            torch._dynamo.mark_dynamic(context.documents.edges, 0)
        return compute(x_BTD, context)

    return computed


def _leave_out_of_experts(layer: MoE, on_gpu: bool) -> None:
    moe, dispatcher = layer.moe, layer.dispatcher
    if moe.is_random:
        _leave_out(layer, "keys")
        _leave_out(layer.router, "forward")
    has_any_number = isinstance(dispatcher, ExpertDispatcher) or moe.capacity_factor or moe.second_expert != "always"
    if has_any_number or not on_gpu:
        _leave_out(layer, "send", "through_experts")
    if isinstance(dispatcher, SequenceSlice) and dispatcher.tokens.size > 1:
        _leave_out(dispatcher, "total")


def _leave_out(owner: object, *names: str) -> None:
    """Of graphs: these methods of the owner run as they are, and all that they call."""
    for name in names:
        setattr(owner, name, torch.compiler.disable(getattr(owner, name)))
