"""DeepSeek-V3: https://arxiv.org/abs/2412.19437."""

from typing import Any

from moray.model.hf.deepseek import LATENT, LATENT_NAMES, SEQUENCE_BALANCE, SHARED
from moray.model.hf.family import Family, Rule
from moray.model.hf.fields import Fields, refused
from moray.model.hf.names import DEEPSEEK_MOE
from moray.model.hf.rope import rope
from moray.model.hf.rules import SILU, decoder, fixed, ours, same, unused


def _read_further(fields: Fields) -> dict[str, Any]:
    """Layers behind the last, which predict further tokens: they are no part of the model, and left unread."""
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        if (count := fields.take(name, None)) not in (None, 0, 1):
            raise refused(name, count, "moray knows files with one such layer at most")
    return {}


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    rules=(
        *decoder(eps=1e-6),
        *LATENT,
        SILU,
        rope(interleaved=True),
        same("rope_interleave", "position.interleaved", True),
        same("intermediate_size", "ffn.width"),
        same("n_routed_experts", "moe.n_experts", alias="num_local_experts"),
        same("num_experts_per_tok", "moe.top_k"),
        same("moe_intermediate_size", "moe.expert_width"),
        SHARED,
        same("first_k_dense_replace", "moe.n_dense_layers", 3),
        same("routed_scaling_factor", "moe.gate_scale", 2.5),
        same("norm_topk_prob", "moe.normalise_gates", True),
        same("n_group", "moe.n_groups", 8),
        same("topk_group", "moe.top_k_groups", 4),
        ours(moe={"score": "sigmoid", "group_score": "top2"}),
        fixed("topk_method", "noaux_tc"),
        fixed("scoring_func", "sigmoid"),
        fixed("moe_layer_freq", 1),
        SEQUENCE_BALANCE,
        Rule(_read_further, lambda config: {"num_nextn_predict_layers": 0}),
        unused("ep_size"),
    ),
    table=lambda config: DEEPSEEK_MOE | LATENT_NAMES,
    ignored=r"model\.layers\.{n_layers}\..*|.*\.rotary_emb\.inv_freq",
)
