"""Multi-head latent attention: keys and values of all heads are made from one small vector a token.

DeepSeek-V2, section 2.1; the same in DeepSeek-V3, section 2.1.1. Decoding caches that vector alone, and makes no keys
or values of it: the product that would make the keys is applied to the query, the one for the values to the output.
"""

# Shapes: B batch, T new tokens, S tokens in the cache, H heads, D model width, r kv_rank, p rope_dim, n nope_dim,
# e value_dim, d = n + p channels of a query or key, q what queries are made of: q_rank, or D without one.

import torch
from torch import Tensor, nn

from moray.model.attention.cache import KVCache
from moray.model.attention.rope import rotate, yarn_scale
from moray.model.attention.sdpa import Scoring, attend, attend_visible
from moray.model.config.architecture import ModelConfig
from moray.model.context import Context
from moray.model.norm import RMSNorm
from moray.model.sharded import Linear, RowLinear, WholeTokens

LATENT_EPS = 1e-6
"""Epsilon of the two norms here, whatever the model's: DeepSeek's code (and transformers) leave it at its default."""


class LatentAttention(nn.Module):
    """Shapes: x_BTD -> [B, T, D]. With a cache, the T tokens follow those it holds.

    Source: DeepSeek-V2, eqs. 9-19 (decoupled RoPE: 14-19).
    """

    tokens = WholeTokens()
    attend = staticmethod(attend)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        attention, latent = config.attention, config.attention.latent
        assert latent is not None
        self.layer, self.latent = layer, latent
        self.interleaved = config.position.interleaved
        scale = attention.scale or attention.head_dim**-0.5
        self.scoring = Scoring(scale * yarn_scale(config.position.scaling))
        q_width = attention.n_heads * attention.head_dim
        if latent.q_rank is None:
            self.query = Linear(config.d_model, q_width, bias=False)
        else:
            self.query_down = Linear(config.d_model, latent.q_rank, bias=False)
            self.query_norm = RMSNorm(latent.q_rank, LATENT_EPS)
            self.query_up = Linear(latent.q_rank, q_width, bias=False)
        self.kv_down = Linear(config.d_model, latent.kv_rank + latent.rope_dim, bias=False)
        self.kv_norm = RMSNorm(latent.kv_rank, LATENT_EPS)
        # Each head's rows: nope_dim for the key, then value_dim for the value.
        self.kv_up = Linear(latent.kv_rank, attention.n_heads * (latent.nope_dim + latent.value_dim), bias=False)
        self.output = RowLinear(attention.n_heads * latent.value_dim, config.d_model, bias=attention.output_bias)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        assert context.rope is not None  # the config wants RoPE with latent attention
        # Small vectors are made of this rank's tokens, and travel in place of the large ones.
        small_BTq = x_BTD if self.latent.q_rank is None else self.query_norm(self.query_down(x_BTD))
        compressed_BTr, k_rope_BTp = self.kv_down(x_BTD).split([self.latent.kv_rank, self.latent.rope_dim], dim=-1)
        small_BTq, compressed_BTr, k_rope_BTp = self.tokens.gather_each(
            small_BTq, self.kv_norm(compressed_BTr), k_rope_BTp
        )
        q_nope_BTHn, q_rope_BTHp = self._queries(small_BTq)
        k_rope_BT1p = k_rope_BTp[:, :, None]
        q_rope_BTHp, k_rope_BT1p = (rotate(x, *context.rope, self.interleaved) for x in (q_rope_BTHp, k_rope_BT1p))
        cache, documents = context.cache, context.documents
        if cache is not None:
            token_B1Tc = cache.turned(torch.cat((compressed_BTr[:, :, None], k_rope_BT1p), dim=-1)).transpose(1, 2)
            (held_B1Sc,) = cache.extend(self.layer, token_B1Tc)
        if cache is None or cache.length == 0:
            k_BTHd, v_BTHe = self._keys_and_values(compressed_BTr, k_rope_BT1p)
            q_BTHd = torch.cat((q_nope_BTHn, q_rope_BTHp), dim=-1)
            out_BTHe = self.attend(q_BTHd, k_BTHd, v_BTHe, self.scoring, documents)
        else:
            q_nope_BTHn, q_rope_BTHp = cache.turned(q_nope_BTHn), cache.turned(q_rope_BTHp)
            out_BTHe = cache.turned(self._absorbed(q_nope_BTHn, q_rope_BTHp, held_B1Sc, cache))
        return self.output(out_BTHe.flatten(2))

    def _queries(self, small_BTq: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.latent
        q_BTX = self.query(small_BTq) if latent.q_rank is None else self.query_up(small_BTq)
        q_BTHd = q_BTX.unflatten(-1, (-1, latent.nope_dim + latent.rope_dim))
        q_nope_BTHn, q_rope_BTHp = q_BTHd.split([latent.nope_dim, latent.rope_dim], dim=-1)
        return q_nope_BTHn, q_rope_BTHp

    def _keys_and_values(self, compressed_BTr: Tensor, k_rope_BT1p: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.latent
        up_BTHx = self.kv_up(compressed_BTr).unflatten(-1, (-1, latent.nope_dim + latent.value_dim))
        k_nope_BTHn, v_BTHe = up_BTHx.split([latent.nope_dim, latent.value_dim], dim=-1)
        # Every head reads the same turned channels (eq. 18).
        k_rope_BTHp = k_rope_BT1p.expand(-1, -1, k_nope_BTHn.shape[2], -1)
        return torch.cat((k_nope_BTHn, k_rope_BTHp), dim=-1), v_BTHe

    def _absorbed(self, q_nope_BTHn: Tensor, q_rope_BTHp: Tensor, held_B1Sc: Tensor, cache: KVCache) -> Tensor:
        """Attention to the cached vectors themselves: (W_k c) · q = c · (W_k^T q), sum w (W_v c) = W_v sum w c."""
        latent, (tokens, heads) = self.latent, q_nope_BTHn.shape[1:3]
        up_Hxr = self.kv_up.matrix().unflatten(0, (heads, latent.nope_dim + latent.value_dim))
        k_up_Hnr, v_up_Her = up_Hxr.split([latent.nope_dim, latent.value_dim], dim=1)
        q_BTHr = torch.einsum("bthn,hnr->bthr", q_nope_BTHn, k_up_Hnr)
        # All heads read the same vectors, so they are T * H queries of one head.
        q_B1Xc = torch.cat((q_BTHr, q_rope_BTHp), dim=-1).flatten(1, 2)[:, None]
        visible = cache.visible(self.layer, tokens)
        if visible is not None:
            visible = visible.repeat_interleave(heads, dim=-2)
        # The vectors serve as values too; what the turned channels sum to is left out.
        out_B1Xc = attend_visible(q_B1Xc, held_B1Sc, held_B1Sc, self.scoring, visible)
        out_BTHr = out_B1Xc[:, 0, :, : latent.kv_rank].unflatten(1, (tokens, heads))
        return torch.einsum("bthr,her->bthe", out_BTHr, v_up_Her)
