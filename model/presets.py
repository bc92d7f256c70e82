"""Named architectures with their published dimensions."""

import difflib
from typing import Any

from model.config import merge

_MINIMIND_3: dict[str, Any] = {
    "vocab_size": 6400,
    "n_layers": 8,
    "d_model": 768,
    "max_seq_len": 32768,
    "position": {"theta": 1e6},
    "attention": {"n_heads": 8, "n_kv_heads": 4, "head_dim": 96, "qk_norm": "head"},
    "ffn": {"width": 2432},
}

_DEMO_DENSE: dict[str, Any] = {
    "vocab_size": 6400,
    "n_layers": 4,
    "d_model": 256,
    "max_seq_len": 2048,
    "position": {"theta": 1e4},
    "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "qk_norm": "head"},
    "ffn": {"width": 704},
}

# DeepSeek-V3 in small: one dense layer, fine-grained and shared experts, sigmoid scores, groups, a routing bias.
_DEMO_MOE = {
    "n_experts": 16,
    "top_k": 4,
    "expert_width": 128,
    "n_shared": 1,
    "n_dense_layers": 1,
    "score": "sigmoid",
    "gate_scale": 1.5,
    "n_groups": 4,
    "top_k_groups": 2,
    "balance_loss": 1e-4,
    "bias_update_rate": 1e-3,
}

PRESETS: dict[str, dict[str, Any]] = {
    "minimind-3": _MINIMIND_3,
    "minimind-3-moe": merge(
        _MINIMIND_3, {"moe": {"n_experts": 4, "top_k": 1, "expert_width": 2432, "balance_loss": 5e-4}}
    ),
    "demo-dense": _DEMO_DENSE,
    "demo-moe": merge(_DEMO_DENSE, {"moe": _DEMO_MOE}),
}


def preset_fields(name: str) -> dict[str, Any]:
    """The fields of a preset. Raises ValueError with the nearest name if there is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRESETS)}"
        raise ValueError(f"model.preset={name} is not known; {hint}")
    return PRESETS[name]
