"""GLM-4.5's experts: grouped queries with QK-norm and DeepSeek-V3's routing: https://arxiv.org/abs/2508.06471."""

from typing import Any

from moray import UserError
from moray.model.config.architecture import ModelConfig
from moray.model.hf.family import Family, Rule
from moray.model.hf.fields import Fields, refused
from moray.model.hf.names import DEEPSEEK_MOE
from moray.model.hf.rope import rope
from moray.model.hf.rules import SILU, at, decoder, heads, ours, same, translated


def _read_shared(fields: Fields) -> dict[str, Any]:
    shared = fields.take("n_shared_experts", 1)
    if not shared:
        raise refused("n_shared_experts", shared, "this family has at least 1")
    # The layers that predict further tokens are not part of the model.
    fields.take("num_nextn_predict_layers", None)
    return {"moe": {"n_shared": shared}}


def _write_shared(config: ModelConfig) -> dict[str, Any]:
    if not at(config, "moe.n_shared"):
        raise UserError("model.moe.n_shared=0 must be at least 1")
    return {"n_shared_experts": at(config, "moe.n_shared"), "num_nextn_predict_layers": 0}


GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    has_classifier=False,
    rules=(
        *decoder(eps=1e-5),
        heads(8),
        SILU,
        rope(partial=0.5),
        same("attention_bias", "attention.qkv_bias", False),
        translated("use_qk_norm", "attention.qk_norm", {False: None, True: "head"}, False),
        same("intermediate_size", "ffn.width"),
        ours(moe={"score": "sigmoid", "group_score": "top2"}),
        same("n_routed_experts", "moe.n_experts", alias="num_local_experts"),
        same("num_experts_per_tok", "moe.top_k"),
        same("moe_intermediate_size", "moe.expert_width"),
        same("first_k_dense_replace", "moe.n_dense_layers", 1),
        same("norm_topk_prob", "moe.normalise_gates", True),
        same("routed_scaling_factor", "moe.gate_scale", 1.0),
        same("n_group", "moe.n_groups", 1),
        same("topk_group", "moe.top_k_groups", 1),
        Rule(_read_shared, _write_shared),
    ),
    table=lambda config: DEEPSEEK_MOE,
    ignored=r"model\.layers\.{n_layers}\..*|.*\.rotary_emb\.inv_freq",
)
