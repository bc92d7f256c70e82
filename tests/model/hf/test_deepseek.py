"""DeepSeek-V2 and V3 against transformers, which computes no auxiliary loss of theirs."""

from collections.abc import Callable

import pytest
import transformers
from hf_parity import CHECKS, Case, Pair, fixture

IS_4 = transformers.__version__.startswith("4")

LATENT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}
EXPERTS = {
    "intermediate_size": 112,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "aux_loss_alpha": 0.0,
}
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
V3 = {**LATENT, **EXPERTS, "n_group": 4, "topk_group": 2}


def rope(theta: float, **scaling: object) -> dict[str, object]:
    """RoPE's settings as both 4.57 and 5.x take them."""
    return {
        "rope_theta": theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, **scaling},
    }


def yarn(mscale: float, mscale_all_dim: float) -> dict[str, object]:
    return rope(
        1e4,
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=16,
        beta_fast=8.0,
        beta_slow=1.0,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )


CASES = [
    Case("DeepSeek-V2", "DeepseekV2", {**LATENT, **EXPERTS, **LIMITED, **rope(1e3)}, "limited to groups"),
    # DeepSeek's own code and 5.x multiply the scores' scale with m(mscale_all_dim)^2; 4.57 does not.
    Case(
        "DeepSeek-V2",
        "DeepseekV2",
        {**LATENT, **EXPERTS, **yarn(0.9, 0.0 if IS_4 else 0.7), "q_lora_rank": None},
        "Lite, YaRN",
    ),
    Case("DeepSeek-V3", "DeepseekV3", {**V3, **yarn(1.0, 0.7)}),
    Case(
        "DeepSeek-V3",
        "DeepseekV3",
        {**V3, **rope(1e4), "q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False},
        "half-split RoPE, plain gates",
    ),
]

pair = fixture(CASES)


@pytest.mark.parametrize("check", CHECKS)
def test_parity(pair: Pair, check: Callable[[Pair], None]) -> None:
    check(pair)
