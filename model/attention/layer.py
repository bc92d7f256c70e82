"""Attention of one layer: multi-head, multi-query, grouped-query or latent, as the config says."""

# Shapes: B batch, T tokens, H query heads, G key and value heads, d channels of a head, D model width.

from torch import Tensor, nn

from moray.model.attention.cache import KVCache
from moray.model.attention.documents import Documents
from moray.model.attention.latent import LatentAttention
from moray.model.attention.rope import rotate
from moray.model.attention.sdpa import Scoring, attend, attend_visible
from moray.model.config.architecture import ModelConfig
from moray.model.context import Context
from moray.model.norm import RMSNorm
from moray.model.sharded import Linear, RowLinear, WholeTokens


def build_attention(config: ModelConfig, layer: int) -> nn.Module:
    """The attention of a layer: forward(x_BTD, context) -> [B, T, D]."""
    return LatentAttention(config, layer) if config.attention.latent else Attention(config, layer)


class Attention(nn.Module):
    """Multi-head, multi-query or grouped-query attention within documents.

    `kv_heads`: which of the key and value heads held here the query heads held here read, each of them an equal run of
    neighbouring query heads; by default all. Where key heads are fewer than tensor-parallel ranks, a rank holds more of
    them than it reads.

    Shapes: x_BTD -> [B, T, D]. With a cache, the T tokens follow those it holds.
    """

    tokens = WholeTokens()
    attend = staticmethod(attend)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        attention = config.attention
        self.layer, self.head_dim, self.qk_norm = layer, attention.head_dim, attention.qk_norm
        self.interleaved = config.position.interleaved
        self.scoring = Scoring(
            scale=attention.scale or attention.head_dim**-0.5,
            window=attention.window if attention.is_local(layer) else None,
            softcap=attention.softcap,
        )
        self.kv_heads: list[int] | None = None
        q_width, kv_width = attention.n_heads * self.head_dim, attention.n_kv_heads * self.head_dim
        self.query = Linear(config.d_model, q_width, bias=attention.qkv_bias)
        self.key = Linear(config.d_model, kv_width, bias=attention.qkv_bias)
        self.value = Linear(config.d_model, kv_width, bias=attention.qkv_bias)
        self.output = RowLinear(q_width, config.d_model, bias=attention.output_bias)
        if self.qk_norm:
            is_full = self.qk_norm == "full"
            self.query_norm = RMSNorm(q_width if is_full else self.head_dim, config.norm.eps)
            self.key_norm = RMSNorm(kv_width if is_full else self.head_dim, config.norm.eps)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        q, k, v = self._project(self.tokens.gather(x_BTD))
        if context.rope:
            q, k = (rotate(x, *context.rope, self.interleaved) for x in (q, k))
        if self.kv_heads is not None:
            k, v = k[:, :, self.kv_heads], v[:, :, self.kv_heads]
        if context.cache is None:
            out_BTHd = self.attend(q, k, v, self.scoring, context.documents)
        else:
            out_BTHd = self._attend_cached(q, k, v, context.documents, context.cache)
        return self.output(out_BTHd.flatten(2))

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Under tensor parallelism, fewer heads."""
        q, k, v = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.qk_norm == "full":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def _attend_cached(
        self, q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, documents: Documents, cache: KVCache
    ) -> Tensor:
        q, k, v = (cache.turned(x).transpose(1, 2) for x in (q_BTHd, k_BTGd, v_BTGd))
        k, v = cache.extend(self.layer, k, v)
        if cache.length == 0:
            return self.attend(q_BTHd, k_BTGd, v_BTGd, self.scoring, documents)
        out_BHTd = attend_visible(q, k, v, self.scoring, cache.visible(self.layer, q.shape[2]))
        return cache.turned(out_BHTd.transpose(1, 2))
