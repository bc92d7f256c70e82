"""DeepSeek-V2: https://arxiv.org/abs/2405.04434."""

from typing import Any

from moray.model.config.architecture import ModelConfig
from moray.model.hf.deepseek import LATENT, LATENT_NAMES, SEQUENCE_BALANCE, SHARED
from moray.model.hf.family import Family, Rule
from moray.model.hf.fields import Fields, refused
from moray.model.hf.names import SHARED_MOE
from moray.model.hf.rope import rope
from moray.model.hf.rules import SILU, at, decoder, fixed, ours, same, unused

_LIMITED = "group_limited_greedy"


def _read_groups(fields: Fields) -> dict[str, Any]:
    method, groups, kept = (fields.take(name, None) for name in ("topk_method", "n_group", "topk_group"))
    if method in (None, "greedy"):
        return {"moe": {"n_groups": 1, "top_k_groups": 1}}
    if method != _LIMITED or groups is None or kept is None:
        raise refused("topk_method", method, f"greedy, or {_LIMITED} with n_group and topk_group")
    return {"moe": {"n_groups": groups, "top_k_groups": kept}}


def _write_groups(config: ModelConfig) -> dict[str, Any]:
    groups, kept = at(config, "moe.n_groups"), at(config, "moe.top_k_groups")
    if groups == kept:
        return {"topk_method": "greedy", "n_group": None, "topk_group": None}
    return {"topk_method": _LIMITED, "n_group": groups, "topk_group": kept}


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    rules=(
        *decoder(eps=1e-6),
        *LATENT,
        SILU,
        rope(interleaved=True),
        same("intermediate_size", "ffn.width"),
        fixed("mlp_bias", False),
        same("n_routed_experts", "moe.n_experts", alias="num_experts"),
        same("num_experts_per_tok", "moe.top_k"),
        same("moe_intermediate_size", "moe.expert_width"),
        SHARED,
        same("first_k_dense_replace", "moe.n_dense_layers", 0),
        same("routed_scaling_factor", "moe.gate_scale", 1.0),
        Rule(_read_groups, _write_groups),
        ours(moe={"score": "softmax", "normalise_gates": False, "group_score": "max"}),
        fixed("scoring_func", "softmax"),
        # DeepSeek's code divides by the gates' sum and leaves out the factor; transformers does neither.
        fixed("norm_topk_prob", False),
        fixed("moe_layer_freq", 1),
        SEQUENCE_BALANCE,
        unused("ep_size"),
    ),
    table=lambda config: SHARED_MOE | LATENT_NAMES,
)
