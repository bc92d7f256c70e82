"""What autograd keeps of a forward pass for the backward one, found out without computing or holding any of it.

One layer of each kind runs on fake tensors, which have a shape, a dtype and a storage but no memory.
"""

# Shapes: B sequences, T tokens of each, D model width.

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moray.model.attention.documents import Documents
from moray.model.attention.latent import LatentAttention
from moray.model.attention.layer import Attention
from moray.model.attention.rope import rope_angles
from moray.model.block import Block
from moray.model.config.architecture import ModelConfig
from moray.model.context import Context
from moray.model.decoder import Decoder
from moray.model.feedforward import FeedForward
from moray.model.moe.router import Router
from moray.model.randomness import Randomness
from moray.model.recompute import Recompute, noting
from moray.model.sharded import WholeTokens


class Activations(NamedTuple):
    """Bytes that one sequence leaves: in each layer, and outside of them (tokens, angles, last norm, head).

    transient: the most that a layer has beside that, on its way forward or back.
    """

    layers: list[int]
    outside: int
    transient: int

    @property
    def total(self) -> int:
        """What is left."""
        return sum(self.layers) + self.outside


def activation_bytes(
    config: ModelConfig,
    seq_len: int,
    recompute: Recompute = "none",
    *,
    dtype: torch.dtype = torch.bfloat16,
    tp: int = 1,
) -> Activations:
    """Bytes that a rank keeps of one sequence when products run in `dtype` and routers in fp32, as in training.

    Of `tp` ranks that share a sequence, each keeps its part; what they have gathered, each keeps whole.

    Every storage once, but not those of weights and their gradients, nor the few numbers an expert that become a
    routing group's losses; and as if no assignment to an expert were dropped.
    As kernels save it on a CPU: on a GPU, an RMSNorm in bf16 keeps no copies in fp32, as it does here.
    """
    config = config.but(final_softcap=None)  # the loss keeps no logits, which the plain forward pass below would
    save = partial(_saved, dtype=dtype, tp=tp)
    if config.moe:
        config = config.but(moe={"capacity_factor": None, "second_expert": "always"})
    batch, fake = config.moe.group_size if config.moe else 1, FakeTensorMode()
    with fake:
        tokens_BT = torch.zeros(batch, seq_len, dtype=torch.int64)
        x_BTD = torch.empty(batch, seq_len, config.d_model, dtype=dtype, requires_grad=True)
        context = _context(config, batch, seq_len, dtype)
    shared = _storages(list(context.rope or ()))
    kinds: dict[tuple[bool, bool], dict[int, int]] = {}
    layers, transient = [], 0
    for layer in range(config.n_layers):
        kind = config.is_moe_layer(layer), config.attention.is_local(layer)
        if kind not in kinds:
            kinds[kind], beside = save(partial(Block, config, layer, recompute), fake, x_BTD, context)
            transient = max(transient, beside)
        layers.append(sum(size for storage, size in kinds[kind].items() if storage not in shared))
    outside, _ = save(partial(_Ends, config), fake, tokens_BT)
    return Activations(
        [size // batch for size in layers], sum((outside | shared).values()) // batch, transient // batch
    )


def _context(config: ModelConfig, batch: int, tokens: int, dtype: torch.dtype) -> Context:
    rope = None
    if config.position.kind == "rope":
        rope = rope_angles(torch.arange(tokens)[None], config.rotary_dim, config.position, dtype)
    documents = Documents(None, torch.ones(batch, tokens, dtype=torch.bool))
    return Context(rope, documents, None, Randomness(0, 0, torch.arange(batch)))


class _Ends(Decoder):
    """What there is outside of the layers, and one pass through it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.but(n_layers=1, moe=None))
        self.blocks = nn.ModuleList()

    def forward(self, tokens_BT: Tensor) -> Tensor:  # type: ignore[override]
        return self.values(tokens_BT) if self.config.head == "scalar" else super().forward(tokens_BT)


class _Gathered(WholeTokens):
    """Takes note of what ranks would gather."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def gather(self, x_BtX: Tensor) -> Tensor:
        self.tensors.append(x_BtX)
        return x_BtX

    def gather_each(self, *parts_BtX: Tensor) -> tuple[Tensor, ...]:
        self.tensors += parts_BtX
        return parts_BtX


def _saved(
    build: Callable[[], nn.Module], fake: FakeTensorMode, x: Tensor, *context: Any, dtype: torch.dtype, tp: int
) -> tuple[dict[int, int], int]:
    """Bytes of each storage that a module's forward pass keeps on a rank, but for those of weights; and the most that
    there is beside it on the way forward, or back to `x`.
    """
    with torch.device("meta"):
        module = build().to(dtype)
    tokens = _Gathered()
    for child in module.modules():
        if isinstance(child, Router):
            child.to(torch.float32)
        elif isinstance(child, Attention | LatentAttention | FeedForward):
            child.tokens = tokens
    with fake:
        for child in module.modules():
            for name, held in child.named_parameters(recurse=False):
                setattr(child, name, nn.Parameter(torch.empty(held.shape, dtype=held.dtype)))
            for name, buffer in child.named_buffers(recurse=False):
                setattr(child, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    stacked = {weight.shape for weight in module.parameters() if weight.ndim > 2}
    with fake, _Live(stacked) as live:
        with noting() as saved:
            found = module(x, *context)
        sizes, kept = _storages(saved), live.now
        if x.requires_grad:
            torch.autograd.grad(found[0], x, torch.empty_like(x))
    of_weights, gathered = _storages([*module.parameters(), *module.buffers()]), _storages(tokens.tensors)
    left = {
        storage: size if storage in gathered else size // tp
        for storage, size in sizes.items()
        if storage not in of_weights
    }
    return left, (live.most - kept) // tp


class _Live(TorchDispatchMode):
    """Bytes of what operations make that is not gone: `now`, and the `most` at once. But for what has these shapes:
    gradients of stacked weights, which their operation makes unasked.
    """

    def __init__(self, ignored: set[torch.Size]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._ignored = ignored
        self._held: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.shape not in self._ignored:
                self._watch(x.untyped_storage())
        return found

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._held:
            self._held.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._held.discard(address)
        self.now -= size


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of each storage that these share."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
