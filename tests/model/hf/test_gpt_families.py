"""The GPT families before Llama, against transformers."""

from collections.abc import Callable

import pytest
import transformers
from hf_parity import CHECKS, Case, Pair, fixture

GPT2 = {
    **{"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 32},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
UNSCALED = {
    "n_inner": 72,
    "scale_attn_weights": False,
    "activation_function": "relu",
    "tie_word_embeddings": False,
}
LOCAL = {
    "attention_types": [[["global"], 1], [["local"], 3]],
    "intermediate_size": 80,
    "activation_function": "gelu",
}
NEO = {
    "hidden_size": 48,
    "num_layers": 4,
    "num_heads": 4,
    "max_position_embeddings": 32,
    "window_size": 5,
    "attention_types": [[["global", "local"], 2]],
}
NEOX = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def neox_rope(theta: float, share: float, **scaling: object) -> dict[str, object]:
    """RoPE's settings as both 4.57 and 5.x take them, which leave out what is the other's."""
    if transformers.__version__.startswith("4"):
        return {"rotary_emb_base": theta, "rotary_pct": share, "rope_scaling": scaling or None}
    return {"rope_parameters": {"rope_theta": theta, "partial_rotary_factor": share, "rope_type": "default", **scaling}}


# Without RoPE a key's bias moves all scores of a query alike: its gradient is 0, and what is computed is rounding,
# which smaller weights keep below 1e-5 of the others.
CASES = [
    Case("GPT-2", "GPT2", GPT2, std=0.1),
    Case(
        "GPT-2",
        "GPT2",
        {
            **GPT2,
            "n_inner": 72,
            "scale_attn_weights": False,
            "activation_function": "relu",
            "tie_word_embeddings": False,
        },
        "untied, ReLU, unscaled",
        std=0.1,
    ),
    Case("GPT-Neo", "GPTNeo", NEO),
    Case(
        "GPT-Neo",
        "GPTNeo",
        {
            **NEO,
            "attention_types": [[["global"], 1], [["local"], 3]],
            "intermediate_size": 80,
            "activation_function": "gelu",
        },
        "one global layer",
    ),
    Case("GPT-BigCode", "GPTBigCode", GPT2, std=0.1),
    Case("GPT-BigCode", "GPTBigCode", {**GPT2, "multi_query": False, "n_inner": 72}, "multi-head", std=0.1),
    Case("GPT-NeoX", "GPTNeoX", {**NEOX, **neox_rope(1e3, 0.25)}),
    Case(
        "GPT-NeoX",
        "GPTNeoX",
        {
            **NEOX,
            **neox_rope(1e4, 0.5, rope_type="linear", factor=4.0),
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_new",
            "tie_word_embeddings": True,
        },
        "sequential, tied, stretched",
    ),
]

pair = fixture(CASES)


@pytest.mark.parametrize("check", CHECKS)
def test_parity(pair: Pair, check: Callable[[Pair], None]) -> None:
    check(pair)
