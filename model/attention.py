"""Grouped-query attention within documents, and the cache that makes decoding cheap."""

# Shapes: B batch, T tokens, H query heads, G key and value heads, d channels of a head, D model width.

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.norm import RMSNorm
from model.rope import rotate


class KVCache:
    """Keys and values of the tokens seen so far, for every layer, in memory taken once.

    Shapes: keys and values are [layers, B, G, capacity, d].
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, like: Tensor) -> None:
        """`like` is any weight of the model: the cache has its dtype and device."""
        self.keys = like.new_empty(config.n_layers, batch, config.n_kv_heads, capacity, config.head_dim)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def extend(self, layer: int, k_BGTd: Tensor, v_BGTd: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new tokens behind the `length` known ones; returns all of that layer's keys and values."""
        end = self.length + k_BGTd.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"the cache holds {self.keys.shape[3]} tokens; {end} were to be stored")
        self.keys[layer, :, :, self.length : end] = k_BGTd
        self.values[layer, :, :, self.length : end] = v_BGTd
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


@dataclass(frozen=True)
class Positions:
    """What attention needs to know of where tokens stand, made once a forward pass and shared by all layers.

    cos_BT1d, sin_BT1d: RoPE angles. lengths: tokens of each document piece in row-major order, or None when every
    row is one document: attention then runs on the batch whole.
    """

    cos_BT1d: Tensor
    sin_BT1d: Tensor
    lengths: list[int] | None = None


@dataclass(frozen=True)
class Documents:
    """Which tokens of a packed batch belong together, found once on the CPU: no device has to be waited for.

    lengths: as in Positions. valid_BT (bool, on the model's device): False for padding.
    """

    lengths: list[int] | None
    valid_BT: Tensor

    @classmethod
    def of(cls, ids_BT: Tensor, device: torch.device) -> Self:
        """From each token's document id, [B, T]; -1 is padding."""
        return cls(document_lengths(ids_BT), (ids_BT >= 0).to(device, non_blocking=True))


def document_lengths(documents_BT: Tensor) -> list[int] | None:
    """Lengths of the runs of equal document ids, row after row; None when every row is a single run."""
    rows, width = documents_BT.shape
    starts = torch.ones(rows, width, dtype=torch.bool)
    starts[:, 1:] = documents_BT[:, 1:].cpu() != documents_BT[:, :-1].cpu()
    edges = starts.flatten().nonzero().flatten()
    if len(edges) == rows:
        return None
    return torch.diff(edges, append=torch.tensor([rows * width])).tolist()


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
        self.layer, self.head_dim = layer, config.head_dim
        self.query = nn.Linear(config.d_model, config.n_heads * config.head_dim, bias=False)
        self.key = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=False)
        self.value = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=False)
        self.output = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=False)
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, positions: Positions, cache: KVCache | None = None) -> Tensor:
        # Under tensor parallelism x holds a slice of the tokens while the projections return all of them, fewer heads.
        q, k, v = (project(x_BTD).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value))
        q = rotate(self.query_norm(q), positions.cos_BT1d, positions.sin_BT1d)
        k = rotate(self.key_norm(k), positions.cos_BT1d, positions.sin_BT1d)
        out = attend(q, k, v, positions.lengths) if cache is None else self._attend_cached(q, k, v, cache)
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
