"""Qwen2, Qwen3 and Qwen3-MoE: https://arxiv.org/abs/2407.10671, https://arxiv.org/abs/2505.09388."""

from typing import Any

from moray.model.config.architecture import ModelConfig
from moray.model.hf.family import Family, Rule
from moray.model.hf.fields import Fields, refused
from moray.model.hf.names import DENSE, MOE
from moray.model.hf.rope import rope
from moray.model.hf.rules import (
    ATTENTION_BIAS,
    QWEN_WINDOW,
    SILU,
    at,
    balance_loss,
    decoder,
    heads,
    ours,
    same,
    window_everywhere,
)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    rules=(
        *decoder(eps=1e-6),
        heads(32),
        SILU,
        rope(),
        QWEN_WINDOW,
        ours(attention={"qkv_bias": True}),
        same("intermediate_size", "ffn.width"),
    ),
    table=lambda config: DENSE,
)

_QWEN3 = (*decoder(eps=1e-6), SILU, rope(), ATTENTION_BIAS, ours(attention={"qk_norm": "head"}))

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rules=(*_QWEN3, heads(32, 128), QWEN_WINDOW, same("intermediate_size", "ffn.width")),
    table=lambda config: DENSE,
)


def _read_sparse_layers(fields: Fields) -> dict[str, Any]:
    dense = fields.take("mlp_only_layers", None) or []
    if not isinstance(dense, list) or dense != list(range(len(dense))):
        raise refused("mlp_only_layers", dense, "moray knows dense layers before those with experts: [0, 1, …]")
    return {"moe": {"n_dense_layers": len(dense), "every": fields.take("decoder_sparse_step", 1)}}


def _write_sparse_layers(config: ModelConfig) -> dict[str, Any]:
    dense = list(range(at(config, "moe.n_dense_layers")))
    return {"mlp_only_layers": dense, "decoder_sparse_step": at(config, "moe.every")}


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rules=(
        *_QWEN3,
        heads(4),
        window_everywhere(4096, switched=True),
        same("intermediate_size", "ffn.width"),
        same("num_experts", "moe.n_experts", alias="num_local_experts"),
        same("num_experts_per_tok", "moe.top_k"),
        same("moe_intermediate_size", "moe.expert_width"),
        same("norm_topk_prob", "moe.normalise_gates", False),
        Rule(_read_sparse_layers, _write_sparse_layers),
        balance_loss(0.001),
    ),
    table=lambda config: MOE,
)
