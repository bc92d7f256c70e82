"""Gemma 2: https://arxiv.org/abs/2408.00118."""

from typing import Any

from model.config import ModelConfig
from model.hf.family import Family, Rule
from model.hf.fields import Fields, refused
from model.hf.names import DENSE
from model.hf.rope import rope
from model.hf.rules import ATTENTION_BIAS, HEADS, decoder, fixed, layer_types, ours, pattern, same

_GELU = "gelu_pytorch_tanh"


def _read(fields: Fields) -> dict[str, Any]:
    layers, window = fields.take("num_hidden_layers"), fields.take("sliding_window", 4096)
    if fields.take("sliding_window_size", window) != window:
        raise refused("sliding_window_size", fields.take("sliding_window_size"), f"sliding_window={window}")
    types = fields.take("layer_types", None) or ["sliding_attention", "full_attention"] * (layers // 2 + 1)
    return {
        "embedding_scale": fields.take("hidden_size") ** 0.5,
        "attention": {
            "window": window,
            "pattern": pattern(types[:layers]),
            "scale": fields.take("query_pre_attn_scalar", 256) ** -0.5,
        },
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    attention = config.attention
    return {
        # transformers asks for a window even where no layer slides it.
        "sliding_window": attention.window or config.max_seq_len,
        "layer_types": layer_types(config),
        "query_pre_attn_scalar": round(attention.scale**-2) if attention.scale else attention.head_dim,
    }


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    rules=(
        *decoder(eps=1e-6, tied=True),
        HEADS,
        rope(),
        ATTENTION_BIAS,
        ours(norm={"placement": "sandwich", "unit_offset": True}, ffn={"activation": "gelu_tanh"}),
        same("intermediate_size", "ffn.width"),
        fixed("hidden_activation", _GELU),
        fixed("hidden_act", _GELU),
        same("attn_logit_softcapping", "attention.softcap", 50.0),
        same("final_logit_softcapping", "final_softcap", 30.0),
        Rule(_read, _write),
    ),
    table=lambda config: {
        **DENSE,
        "blocks.{layer}.attention_post_norm": "model.layers.{layer}.post_attention_layernorm",
        "blocks.{layer}.ffn_norm": "model.layers.{layer}.pre_feedforward_layernorm",
        "blocks.{layer}.ffn_post_norm": "model.layers.{layer}.post_feedforward_layernorm",
    },
)
