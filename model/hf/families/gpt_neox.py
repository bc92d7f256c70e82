"""GPT-NeoX and Pythia: https://arxiv.org/abs/2204.06745, https://arxiv.org/abs/2304.01373."""

from typing import Any

from model.config import ModelConfig
from model.hf.family import Family, Rule
from model.hf.fields import Fields, refused
from model.hf.gpt import LAYERNORM, PLAIN_FFN, activation, heads, joined_by_head
from model.hf.rope import rope
from model.hf.rules import same, translated

_OURS, _THEIRS = "blocks.{layer}.", "gpt_neox.layers.{layer}."


def _read_rope(fields: Fields) -> dict[str, Any]:
    own = {}
    for name, own_name, default in (
        ("rope_theta", "rotary_emb_base", 1e4),
        ("partial_rotary_factor", "rotary_pct", 0.25),
    ):
        own[name], other = fields.take(own_name, None), fields.take(name, None)
        if None not in (own[name], other) and own[name] != other:
            raise refused(own_name, own[name], f"{name}={other} says otherwise; leave one of them")
        own[name] = default if own[name] is None else own[name]
    return rope(own["rope_theta"], partial=own["partial_rotary_factor"]).read(fields)


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    written = rope(partial=0.25).write(config)
    return written | {"rotary_emb_base": written["rope_theta"], "rotary_pct": written["partial_rotary_factor"]}


def _read_biases(fields: Fields) -> dict[str, Any]:
    bias = fields.take("attention_bias", True)
    return {"attention": {"qkv_bias": bias, "output_bias": bias}}


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    rules=(
        same("vocab_size", "vocab_size"),
        same("hidden_size", "d_model"),
        same("num_hidden_layers", "n_layers"),
        same("max_position_embeddings", "max_seq_len"),
        same("intermediate_size", "ffn.width"),
        same("layer_norm_eps", "norm.eps", 1e-5),
        same("initializer_range", "init.std", 0.02),
        same("tie_word_embeddings", "tied_embeddings", False),
        heads("num_attention_heads", "hidden_size"),
        activation("hidden_act", "gelu"),
        LAYERNORM,
        PLAIN_FFN,
        Rule(_read_rope, _write_rope),
        Rule(_read_biases, lambda config: {"attention_bias": config.attention.output_bias}),
        translated("use_parallel_residual", "residual", {True: "parallel", False: "sequential"}, True),
    ),
    table=lambda config: {
        "embedding": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
        _OURS + "attention_norm": _THEIRS + "input_layernorm",
        _OURS + "ffn_norm": _THEIRS + "post_attention_layernorm",
        **joined_by_head(config, _THEIRS + "attention.query_key_value"),
        _OURS + "attention.output": _THEIRS + "attention.dense",
        _OURS + "ffn.up": _THEIRS + "mlp.dense_h_to_4h",
        _OURS + "ffn.down": _THEIRS + "mlp.dense_4h_to_h",
    },
    ignored=r".*\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
    prefix="gpt_neox.",
)
