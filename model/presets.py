"""Named architectures with their published dimensions."""

import difflib
from typing import Any

_MINIMIND_3: dict[str, Any] = {
    "vocab_size": 6400,
    "n_layers": 8,
    "d_model": 768,
    "n_heads": 8,
    "n_kv_heads": 4,
    "head_dim": 96,
    "d_ff": 2432,
    "max_seq_len": 32768,
    "rope_theta": 1e6,
    "qk_norm": True,
    "tied_embeddings": True,
}

_DEMO_DENSE: dict[str, Any] = {
    "vocab_size": 6400,
    "n_layers": 4,
    "d_model": 256,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 64,
    "d_ff": 704,
    "max_seq_len": 2048,
    "rope_theta": 1e4,
}

PRESETS: dict[str, dict[str, Any]] = {
    "minimind-3": _MINIMIND_3,
    "minimind-3-moe": {**_MINIMIND_3, "n_experts": 4, "top_k": 1, "d_expert": 2432, "balance_loss": 5e-4},
    "demo-dense": _DEMO_DENSE,
    # DeepSeek-V3 in small: one dense layer, fine-grained and shared experts, sigmoid scores, groups, a routing bias.
    "demo-moe": {
        **_DEMO_DENSE,
        "n_experts": 16,
        "top_k": 4,
        "d_expert": 128,
        "n_shared_experts": 1,
        "n_dense_layers": 1,
        "score_function": "sigmoid",
        "gate_scale": 1.5,
        "n_expert_groups": 4,
        "top_k_groups": 2,
        "group_score": "top2",
        "balance_loss": 1e-4,
        "bias_update_rate": 1e-3,
    },
}


def preset_fields(name: str) -> dict[str, Any]:
    """The fields of a preset. Raises ValueError with the nearest name if there is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRESETS)}"
        raise ValueError(f"model.preset={name} is not known; {hint}")
    return PRESETS[name]
