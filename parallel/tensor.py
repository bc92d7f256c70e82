"""Tensor and sequence parallelism: which weight is split how, what travels between the parts, and the vocabulary's.

Between layers each rank holds a slice of every sequence's tokens; inside attention and feed-forward it holds all tokens
and a slice of the heads or the width (Korthikanti et al., 2022). Weights that are not split work on a slice of the
tokens or for a slice of the heads: their gradients are parts of a sum over the ranks (`parallel.shard` adds them up).
"""

# Shapes: B sequences, T tokens of each, t = T / P of them on each of P ranks, D model width, X any width.

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moray.model.attention.latent import LatentAttention
from moray.model.attention.layer import Attention
from moray.model.config.parts import AttentionConfig
from moray.model.decoder import Decoder
from moray.model.feedforward import FeedForward
from moray.model.loss import WholeVocabulary
from moray.model.mixffn import LowRankAdapter
from moray.model.norm import RMSNorm
from moray.model.recompute import cheap
from moray.model.sharded import RowLinear, WholeTokens
from moray.parallel.summing import reduce_scatter


class TokenSlices(WholeTokens):
    """Each of the `tp` mesh's ranks has a run of every sequence's tokens between layers, and all of them within."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group, self.size, self.rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()

    def project(self, x_BTX: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None = None) -> Tensor:
        part_BTX = F.linear(x_BTX, weight)
        out_BtX = self.reduce(part_BTX if added is None else part_BTX + added)
        return out_BtX if bias is None else out_BtX + bias

    def gather(self, x_BtX: Tensor) -> Tensor:
        """It may be gathered again: kept, it would be there as often as there are ranks (Korthikanti et al., 2022,
        section 4.2.2).
        """
        return cheap(self._gather, x_BtX)

    def _gather(self, x_BtX: Tensor) -> Tensor:
        return Exchange.apply(x_BtX, self.all_gather, self.reduce_scatter)

    def gather_alike(self, x_BtX: Tensor) -> Tensor:
        return Exchange.apply(x_BtX, self.all_gather, self.own)

    def gather_each(self, *parts_BtX: Tensor) -> tuple[Tensor, ...]:
        return self.gather(torch.cat(parts_BtX, dim=-1)).split([x.shape[-1] for x in parts_BtX], dim=-1)

    def reduce(self, x_BTX: Tensor) -> Tensor:
        return Exchange.apply(x_BTX, self.reduce_scatter, self.all_gather)

    def total(self, x: Tensor) -> Tensor:
        return Exchange.apply(x, self.all_reduce, self.all_reduce)

    def own(self, x_BT: Tensor) -> Tensor:
        return x_BT.chunk(self.size, dim=1)[self.rank]

    def all_gather(self, x_BtX: Tensor) -> Tensor:
        """Without a gradient, as `reduce_scatter` is."""
        parts_PBtX = x_BtX.new_empty(self.size, *x_BtX.shape)
        dist.all_gather_single(parts_PBtX.flatten(0, 1), x_BtX.contiguous(), group=self.group)
        return parts_PBtX.transpose(0, 1).flatten(1, 2)

    def reduce_scatter(self, x_BTX: Tensor) -> Tensor:
        parts_PBtX = x_BTX.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        own_BtX = torch.empty_like(parts_PBtX[0])
        reduce_scatter(parts_PBtX, own_BtX, self.group)
        return own_BtX

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, op, group=self.group)
        return total


class Exchange(torch.autograd.Function):
    """`there(x)` between ranks; the gradient goes `back`, by its transpose.

    What a rank makes of what all have read alike is a part of the result: such gradients are summed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.back(grad), None, None


class VocabularyShard(WholeVocabulary):
    """The rows of embedding and head that this tensor-parallel rank holds, and the sums over its peers."""

    tokens: TokenSlices

    def __init__(self, tokens: TokenSlices, vocab_size: int) -> None:
        self.tokens, self.rows = tokens, vocab_size // tokens.size
        self.start = tokens.rank * self.rows

    def embed(self, embedding: nn.Embedding, tokens_BT: Tensor) -> Tensor:
        index_BT = tokens_BT - self.start
        here_BT = (index_BT >= 0) & (index_BT < self.rows)
        return self.tokens.reduce(embedding(torch.where(here_BT, index_BT, 0)) * here_BT[..., None])

    def total(self, x: Tensor) -> Tensor:
        return self.tokens.all_reduce(x)

    def highest(self, x: Tensor) -> Tensor:
        return self.tokens.all_reduce(x, dist.ReduceOp.MAX)


class SlicedRMSNorm(RMSNorm):
    """A norm over channels of which this rank holds a run: the ranks' sums of squares are added up."""

    def __init__(self, whole: RMSNorm, tokens: TokenSlices) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.eps, self.unit_offset = whole.weight, whole.bias, whole.eps, whole.unit_offset
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x, self.weight, self.bias)  # an exchange is not cheap

    def normalise(self, x: Tensor, weight_D: Tensor, bias_D: Tensor | None) -> Tensor:
        accurate = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = self.tokens.total(accurate.square().sum(-1, keepdim=True))
        own_X = weight_D.chunk(self.tokens.size)[self.tokens.rank]
        return (accurate * torch.rsqrt(squares / len(weight_D) + self.eps)).to(x.dtype) * own_X


def apply_tensor_parallel(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Turns the weights that are split into DTensors over the `tp` mesh, and has the layers exchange their tokens."""
    tokens, config = TokenSlices(mesh), decoder.config
    _split(mesh, 0, decoder.embedding)
    if config.head == "vocabulary":
        _split(mesh, 0, decoder.head)
    decoder.tie()
    decoder.vocabulary = VocabularyShard(tokens, config.vocab_size)
    for module in decoder.modules():
        if isinstance(module, Attention | LatentAttention | FeedForward | LowRankAdapter | RowLinear):
            module.tokens = tokens
        if isinstance(module, Attention):
            _split_heads(module, config.attention, mesh, tokens)
        elif isinstance(module, LatentAttention):
            _split(mesh, 0, module.query_up if module.latent.q_rank else module.query, module.kv_up)
            _split(mesh, 1, module.output)
        elif isinstance(module, FeedForward):
            _split(mesh, 0, module.up, *(part for part in (module.gate, module.conv) if part is not None))
            _split(mesh, 1, module.down)
        elif isinstance(module, LowRankAdapter):
            _split(mesh, 1, module.a)
            _split(mesh, 0, module.b)


def _split_heads(attention: Attention, config: AttentionConfig, mesh: DeviceMesh, tokens: TokenSlices) -> None:
    _split(mesh, 0, attention.query)
    _split(mesh, 1, attention.output)
    attention.kv_heads = kv_heads_read(config, tokens.size, tokens.rank)
    has_own = attention.kv_heads is None
    if has_own:
        _split(mesh, 0, attention.key, attention.value)
    if config.qk_norm == "full":
        attention.query_norm = SlicedRMSNorm(attention.query_norm, tokens)
        if has_own:
            attention.key_norm = SlicedRMSNorm(attention.key_norm, tokens)


def kv_heads_read(config: AttentionConfig, ranks: int, rank: int) -> list[int] | None:
    """Which key and value heads a rank's query heads read, where every rank computes all of them; None where it has its
    own. One entry for each group of query heads, or for each query head where the groups are uneven.
    """
    if config.n_kv_heads % ranks == 0:
        return None
    share = config.n_heads // ranks
    read = [head * config.n_kv_heads // config.n_heads for head in range(rank * share, (rank + 1) * share)]
    groups = sorted(set(read))
    is_even = all(read.count(group) * len(groups) == share for group in groups)
    return groups if is_even else read


def _split(mesh: DeviceMesh, dim: int, *modules: nn.Module) -> None:
    """Each rank has a run of the weights' outputs (0), bias included, or inputs (1), whose bias stays whole.

    Of a LoRA's B A, the outputs are B's and the inputs A's.
    """
    for module in modules:
        for name, weight in list(module.named_parameters(recurse=False)):
            if dim < weight.ndim and name != ("lora_a", "lora_b")[dim]:
                split: DTensor = distribute_tensor(weight, mesh, [Shard(dim)], src_data_rank=None)
                setattr(module, name, nn.Parameter(split, weight.requires_grad))
