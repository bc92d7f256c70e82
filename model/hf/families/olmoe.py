"""OLMoE: https://arxiv.org/abs/2409.02060."""

from moray.model.hf.family import Family
from moray.model.hf.names import MOE
from moray.model.hf.rope import rope
from moray.model.hf.rules import (
    ATTENTION_BIAS,
    EXPERT_WIDTH,
    SILU,
    balance_loss,
    decoder,
    fixed,
    natural_heads,
    ours,
    same,
)

OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    has_classifier=False,
    rules=(
        *decoder(eps=1e-5),
        natural_heads(),
        SILU,
        rope(),
        ATTENTION_BIAS,
        ours(attention={"qk_norm": "full"}),
        fixed("clip_qkv", None),
        EXPERT_WIDTH,
        same("num_experts", "moe.n_experts", alias="num_local_experts"),
        same("num_experts_per_tok", "moe.top_k"),
        same("norm_topk_prob", "moe.normalise_gates", False),
        balance_loss(0.01),
    ),
    table=lambda config: MOE,
)
