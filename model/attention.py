"""Grouped-query attention within documents."""

# Shapes: B batch, T tokens, H query heads, G key and value heads, d channels of a head, D model width.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import KVCache
from model.config import ModelConfig
from model.context import Context
from model.norm import RMSNorm
from model.rope import rotate


def attend(q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, lengths: list[int] | None) -> Tensor:
    """Causal attention in which no token sees another document.

    Each document is one call of SDPA's causal kernel, so neither a [T, T] mask nor the products it would hide exist.
    Shapes: [B, T, H, d], [B, T, G, d] twice -> [B, T, H, d].
    """
    if lengths is None:
        return _causal(q_BTHd, k_BTGd, v_BTGd)
    pieces = zip(*(x.flatten(0, 1).split(lengths) for x in (q_BTHd, k_BTGd, v_BTGd)), strict=True)
    return torch.cat([_causal(q[None], k[None], v[None])[0] for q, k, v in pieces]).view_as(q_BTHd)


def _causal(q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHd, k_BTGd, v_BTGd))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Shapes: x_BTD -> [B, T, D]. With a cache, T new tokens follow those it holds (several only into an empty one)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        attention = config.attention
        self.layer, self.head_dim = layer, attention.head_dim
        self.interleaved = config.position.interleaved
        self.query = nn.Linear(config.d_model, attention.n_heads * self.head_dim, bias=False)
        self.key = nn.Linear(config.d_model, attention.n_kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(config.d_model, attention.n_kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(attention.n_heads * self.head_dim, config.d_model, bias=False)
        has_norm = attention.qk_norm == "head"
        self.query_norm = RMSNorm(self.head_dim, config.norm.eps) if has_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim, config.norm.eps) if has_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        # Under tensor parallelism x holds a slice of the tokens while the projections return all of them, fewer heads.
        q, k, v = (project(x_BTD).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value))
        q, k = self.query_norm(q), self.key_norm(k)
        if context.rope:
            q, k = (rotate(x, *context.rope, self.interleaved) for x in (q, k))
        if context.cache is None:
            out = attend(q, k, v, context.documents.lengths)
        else:
            out = self._attend_cached(q, k, v, context.cache)
        return self.output(out.flatten(2))

    def _attend_cached(self, q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, cache: KVCache) -> Tensor:
        tokens, fresh = q_BTHd.shape[1], cache.length == 0
        if tokens > 1 and not fresh:
            raise ValueError(f"{tokens} tokens at once follow a cache of {cache.length}; after the prompt, give one")
        k, v = cache.extend(self.layer, k_BTGd.transpose(1, 2), v_BTGd.transpose(1, 2))
        out = F.scaled_dot_product_attention(
            q_BTHd.transpose(1, 2), k, v, is_causal=fresh, enable_gqa=q_BTHd.shape[2] != k.shape[1]
        )
        return out.transpose(1, 2)
