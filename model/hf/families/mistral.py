"""Mistral and Mixtral: https://arxiv.org/abs/2310.06825, https://arxiv.org/abs/2401.04088."""

from moray.model.hf.family import Family
from moray.model.hf.names import DENSE
from moray.model.hf.rope import rope
from moray.model.hf.rules import EXPERT_WIDTH, SILU, balance_loss, decoder, fixed, heads, same, window_everywhere

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    rules=(*decoder(eps=1e-6), heads(8), SILU, rope(), window_everywhere(4096), same("intermediate_size", "ffn.width")),
    table=lambda config: DENSE,
)

_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}."

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    rules=(
        *decoder(eps=1e-5),
        heads(8),
        SILU,
        rope(1e6),
        window_everywhere(None),
        EXPERT_WIDTH,
        same("num_local_experts", "moe.n_experts"),
        same("num_experts_per_tok", "moe.top_k"),
        balance_loss(0.001),
        # Theirs scales what the experts read too, not what the router reads alone.
        fixed("router_jitter_noise", 0.0),
    ),
    table=lambda config: {
        **DENSE,
        "blocks.{layer}.ffn.router.linear": "model.layers.{layer}.block_sparse_moe.gate",
        "blocks.{layer}.ffn.experts.gate_EFD": _EXPERT + "w1.weight",
        "blocks.{layer}.ffn.experts.up_EFD": _EXPERT + "w3.weight",
        "blocks.{layer}.ffn.experts.down_EDF": _EXPERT + "w2.weight",
    },
)
