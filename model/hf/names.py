"""The names that Llama gave its weights and most families kept."""

from moray.model.hf.places import Source

_OURS, _THEIRS = "blocks.{layer}.", "model.layers.{layer}."

DENSE: dict[str, str | Source] = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    _OURS + "attention_norm": _THEIRS + "input_layernorm",
    _OURS + "ffn_norm": _THEIRS + "post_attention_layernorm",
    _OURS + "attention.query": _THEIRS + "self_attn.q_proj",
    _OURS + "attention.key": _THEIRS + "self_attn.k_proj",
    _OURS + "attention.value": _THEIRS + "self_attn.v_proj",
    _OURS + "attention.output": _THEIRS + "self_attn.o_proj",
    _OURS + "attention.query_norm": _THEIRS + "self_attn.q_norm",
    _OURS + "attention.key_norm": _THEIRS + "self_attn.k_norm",
    _OURS + "ffn.gate": _THEIRS + "mlp.gate_proj",
    _OURS + "ffn.up": _THEIRS + "mlp.up_proj",
    _OURS + "ffn.down": _THEIRS + "mlp.down_proj",
}

MOE: dict[str, str | Source] = {
    **DENSE,
    _OURS + "ffn.router.linear": _THEIRS + "mlp.gate",
    _OURS + "ffn.experts.gate_EFD": _THEIRS + "mlp.experts.{expert}.gate_proj.weight",
    _OURS + "ffn.experts.up_EFD": _THEIRS + "mlp.experts.{expert}.up_proj.weight",
    _OURS + "ffn.experts.down_EDF": _THEIRS + "mlp.experts.{expert}.down_proj.weight",
}

SHARED_MOE: dict[str, str | Source] = {
    **MOE,
    _OURS + "ffn.shared.gate": _THEIRS + "mlp.shared_experts.gate_proj",
    _OURS + "ffn.shared.up": _THEIRS + "mlp.shared_experts.up_proj",
    _OURS + "ffn.shared.down": _THEIRS + "mlp.shared_experts.down_proj",
}

DEEPSEEK_MOE: dict[str, str | Source] = {
    **SHARED_MOE,
    _OURS + "ffn.router.bias_E": _THEIRS + "mlp.gate.e_score_correction_bias",
}
