"""What DeepSeek's families share in config.json: latent attention, shared experts, a balance loss."""

from typing import Any

from moray import UserError
from moray.model.config.architecture import ModelConfig
from moray.model.hf.family import Rule
from moray.model.hf.fields import Fields, refused
from moray.model.hf.places import Source
from moray.model.hf.rules import at, fixed

_FIELDS = {
    "kv_lora_rank": "kv_rank",
    "q_lora_rank": "q_rank",
    "qk_nope_head_dim": "nope_dim",
    "qk_rope_head_dim": "rope_dim",
    "v_head_dim": "value_dim",
}


def _read(fields: Fields) -> dict[str, Any]:
    heads = fields.take("num_attention_heads")
    latent = {our: fields.take(their) for their, our in _FIELDS.items()}
    nope_dim, rope_dim = fields.count("qk_nope_head_dim"), fields.count("qk_rope_head_dim")
    # What transformers derives and writes beside them.
    derived = {"num_key_value_heads": heads, "head_dim": rope_dim, "qk_head_dim": nope_dim + rope_dim}
    for name, value in derived.items():
        if (stated := fields.take(name, None)) not in (None, value):
            raise refused(name, stated, f"with latent attention it is {value}")
    return {"attention": {"n_heads": heads, "n_kv_heads": heads, "head_dim": nope_dim + rope_dim, "latent": latent}}


def _write(config: ModelConfig) -> dict[str, Any]:
    latent, heads = config.attention.latent, config.attention.n_heads
    if latent is None:
        raise UserError("model.attention.latent=None is not latent attention")
    written = {their: getattr(latent, our) for their, our in _FIELDS.items()}
    return {"num_attention_heads": heads, "num_key_value_heads": heads, **written}


def _read_shared(fields: Fields) -> dict[str, Any]:
    shared = fields.take("n_shared_experts")
    if not shared:
        raise refused("n_shared_experts", shared, "DeepSeek's layers have at least 1")
    return {"moe": {"n_shared": shared}}


def _write_shared(config: ModelConfig) -> dict[str, Any]:
    if not at(config, "moe.n_shared"):
        raise UserError("model.moe.n_shared=0 must be at least 1")
    return {"n_shared_experts": at(config, "moe.n_shared")}


SHARED = Rule(_read_shared, _write_shared)
"""transformers builds shared experts always, of no width if there are none."""

LATENT = (Rule(_read, _write), fixed("attention_bias", False))

_OURS, _THEIRS = "blocks.{layer}.attention.", "model.layers.{layer}.self_attn."

LATENT_NAMES: dict[str, str | Source] = {
    _OURS + "query_down": _THEIRS + "q_a_proj",
    _OURS + "query_norm": _THEIRS + "q_a_layernorm",
    _OURS + "query_up": _THEIRS + "q_b_proj",
    _OURS + "kv_down": _THEIRS + "kv_a_proj_with_mqa",
    _OURS + "kv_norm": _THEIRS + "kv_a_layernorm",
    _OURS + "kv_up": _THEIRS + "kv_b_proj",
}


def _read_balance(fields: Fields) -> dict[str, Any]:
    # seq_aux says of how many sequences; that is moe.group_size, which depends on the batch.
    fields.take("seq_aux", True)
    return {"moe": {"balance_loss": fields.take("aux_loss_alpha", 0.0), "balance_over": "layer"}}


def _write_balance(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    alike = moe is not None and moe.balance_over == "layer" and moe.balance_counts == "all"
    return {"aux_loss_alpha": moe.balance_loss if moe and alike else 0.0, "seq_aux": not moe or moe.group_size == 1}


SEQUENCE_BALANCE = Rule(_read_balance, _write_balance)
"""DeepSeek-V2's expert-level loss (eqs. 23-25), of each layer apart; what is not that is not written."""
