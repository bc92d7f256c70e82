"""Gemma 2: https://arxiv.org/abs/2408.00118."""

from typing import Any

from moray.model.config.architecture import ModelConfig
from moray.model.hf.family import Family, Rule
from moray.model.hf.fields import Fields
from moray.model.hf.names import DENSE
from moray.model.hf.rope import rope
from moray.model.hf.rules import ATTENTION_BIAS, decoder, dividing_heads, fixed, layer_types, ours, pattern, same

_GELU = "gelu_pytorch_tanh"


def _read(fields: Fields) -> dict[str, Any]:
    layers = fields.count("num_hidden_layers")
    fields.take("sliding_window_size", None)  # published files have it; transformers does not read it
    types = fields.take("layer_types", None) or (["sliding_attention", "full_attention"] * layers)[:layers]
    return {
        "embedding_scale": fields.count("hidden_size") ** 0.5,
        "attention": {
            "window": fields.take("sliding_window", 4096),
            "pattern": pattern(types, layers),
            "scale": fields.count("query_pre_attn_scalar", 256) ** -0.5,
        },
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    scale = config.attention.scale
    return {
        # transformers asks for a window even where no layer slides it.
        "sliding_window": config.attention.window or config.max_seq_len,
        "layer_types": layer_types(config),
        "query_pre_attn_scalar": round(scale**-2) if scale else config.attention.head_dim,
    }


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    rules=(
        *decoder(eps=1e-6, tied=True),
        dividing_heads(4, 256),
        rope(),
        ATTENTION_BIAS,
        ours(norm={"placement": "sandwich", "unit_offset": True}, ffn={"activation": "gelu_tanh"}),
        same("intermediate_size", "ffn.width"),
        *(fixed(name, _GELU) for name in ("hidden_activation", "hidden_act")),
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
