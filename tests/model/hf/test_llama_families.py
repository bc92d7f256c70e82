"""The families that grew out of Llama, against transformers."""

from collections.abc import Callable

import pytest
from hf_parity import CHECKS, Case, Pair, fixture

DENSE = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.3}


def rope(theta: float, **scaling: object) -> dict[str, object]:
    """RoPE's settings as both 4.57 and 5.x take them."""
    return {
        "rope_theta": theta,
        "rope_scaling": {"rope_type": "default", **scaling} if scaling else None,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, **scaling},
    }


CASES = [
    Case("Llama 2", "Llama", DENSE),
    Case(
        "Llama 2",
        "Llama",
        {**DENSE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        "biased, tied",
    ),
    Case("Qwen3", "Qwen3", {**DENSE, "head_dim": 24, "attention_bias": True}),
    Case(
        "Qwen3-MoE",
        "Qwen3Moe",
        {**DENSE, **EXPERTS, "head_dim": 24, "moe_intermediate_size": 48, "mlp_only_layers": [0]},
    ),
]

pair = fixture(CASES)


@pytest.mark.parametrize("check", CHECKS)
def test_parity(pair: Pair, check: Callable[[Pair], None]) -> None:
    check(pair)
