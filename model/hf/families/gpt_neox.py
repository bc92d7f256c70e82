"""GPT-NeoX and Pythia: https://arxiv.org/abs/2204.06745, https://arxiv.org/abs/2304.01373."""

from typing import Any

from moray.model.config.architecture import ModelConfig
from moray.model.hf.family import Family, Rule
from moray.model.hf.fields import Fields, refused
from moray.model.hf.gpt import activation, joined_by_head, sizes
from moray.model.hf.rope import rope
from moray.model.hf.rules import same, translated

_OURS, _THEIRS = "blocks.{layer}.", "gpt_neox.layers.{layer}."


def _either(fields: Fields, own: str, general: str, default: float) -> float:
    value, other = fields.take(own, None), fields.take(general, None)
    if None not in (value, other) and value != other:
        raise refused(own, value, f"{general}={other} says otherwise; leave one of them")
    return default if value is None else value


def _read_rope(fields: Fields) -> dict[str, Any]:
    theta = _either(fields, "rotary_emb_base", "rope_theta", 1e4)
    return rope(theta, partial=_either(fields, "rotary_pct", "partial_rotary_factor", 0.25)).read(fields)


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
        *sizes(n_layers="num_hidden_layers", n_heads="num_attention_heads", eps="layer_norm_eps", tied=False),
        same("intermediate_size", "ffn.width"),
        activation("hidden_act", "gelu"),
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
