"""What autograd keeps of a forward pass for the backward one, found out without computing or holding any of it.

One layer of each kind runs on fake tensors, which have a shape, a dtype and a storage but no memory.
"""

# Shapes: B sequences, T tokens of each, D model width.

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from moray.model.attention.rope import rope_angles
from moray.model.block import Block
from moray.model.config.architecture import ModelConfig
from moray.model.context import Context, Documents
from moray.model.decoder import Decoder
from moray.model.moe.router import Router
from moray.model.randomness import Randomness
from moray.model.recompute import Recompute, noting


class Activations(NamedTuple):
    """Bytes that one sequence leaves: in each layer, and outside of them (tokens, angles, last norm, head).

    again: what the layer of which most is computed again leaves when it is. total: the most that there is at once.
    """

    layers: list[int]
    outside: int
    again: int = 0

    @property
    def total(self) -> int:
        return sum(self.layers) + self.outside + self.again


def activation_bytes(config: ModelConfig, seq_len: int, recompute: Recompute = "none") -> Activations:
    """Bytes that are kept of one sequence when products run in bf16 and routers in fp32, as in training.

    Every storage once, but not those of weights and their gradients, nor the few numbers an expert that become a
    routing group's losses; and as if no assignment to an expert were dropped.
    As kernels save it on a CPU: on a GPU, an RMSNorm in bf16 keeps no copies in fp32, as it does here.
    """
    config = config.but(final_softcap=None)  # the loss keeps no logits, which the plain forward pass below would
    if config.moe:
        config = config.but(moe={"capacity_factor": None, "second_expert": "always"})
    batch, fake = config.moe.group_size if config.moe else 1, FakeTensorMode()
    with fake:
        tokens_BT = torch.zeros(batch, seq_len, dtype=torch.int64)
        x_BTD = torch.empty(batch, seq_len, config.d_model, dtype=torch.bfloat16, requires_grad=True)
        context = _context(config, batch, seq_len)
    shared = _storages(list(context.rope or ()))
    kinds: dict[tuple[bool, bool], dict[int, int]] = {}
    layers = []
    for layer in range(config.n_layers):
        kind = config.is_moe_layer(layer), config.attention.is_local(layer)
        if kind not in kinds:
            kinds[kind] = _saved(partial(Block, config, layer, recompute), fake, x_BTD, context)
        layers.append(sum(size for storage, size in kinds[kind].items() if storage not in shared))
    outside = _saved(partial(_without_layers, config), fake, tokens_BT) | shared
    again = max(activation_bytes(config, seq_len).layers) if recompute == "full" else 0
    return Activations([size // batch for size in layers], sum(outside.values()) // batch, again)


def _context(config: ModelConfig, batch: int, tokens: int) -> Context:
    rope = None
    if config.position.kind == "rope":
        rope = rope_angles(torch.arange(tokens)[None], config.rotary_dim, config.position, torch.bfloat16)
    documents = Documents(None, torch.ones(batch, tokens, dtype=torch.bool))
    return Context(rope, documents, None, Randomness(0, 0, torch.arange(batch)))


def _without_layers(config: ModelConfig) -> Decoder:
    decoder = Decoder(config.but(n_layers=1, moe=None))
    decoder.blocks = nn.ModuleList()
    return decoder


def _saved(build: Callable[[], nn.Module], fake: FakeTensorMode, x: Tensor, *context: Any) -> dict[int, int]:
    """Bytes of each storage that a module's forward pass keeps, but for those of weights."""
    with torch.device("meta"):
        module = build().to(torch.bfloat16)
    for child in module.modules():
        if isinstance(child, Router):
            child.to(torch.float32)
    with fake, noting() as saved:
        weights = {
            name: torch.empty(held.shape, dtype=held.dtype, requires_grad=held.requires_grad)
            for name, held in (*module.named_parameters(), *module.named_buffers())
        }
        functional_call(module, weights, (x, *context))
    of_weights = _storages(list(weights.values()))
    return {storage: size for storage, size in _storages(saved).items() if storage not in of_weights}


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of each storage that these share."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
