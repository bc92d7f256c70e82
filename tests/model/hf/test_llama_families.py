"""The families that grew out of Llama, against transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from hf_parity import CHECKS, Case, Pair, fixture

from moray.model.hf import load_pretrained, write_pretrained

DENSE = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.3}
NARROW = {"moe_intermediate_size": 48}
TOP_1 = {**NARROW, "num_experts": 4, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.3}
MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3}
# Caps that are far below what random weights would give.
GEMMA2 = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 40, "head_dim": 24}


def rope(theta: float, **scaling: object) -> dict[str, object]:
    """RoPE's settings as both 4.57 and 5.x take them."""
    return {
        "rope_theta": theta,
        "rope_scaling": {"rope_type": "default", **scaling} if scaling else None,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, **scaling},
    }


WHOLE = {"partial_rotary_factor": 1.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "beta_fast": 4.0, "original_max_position_embeddings": 16}
WINDOW = {"sliding_window": 5}
GROUPS = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
}

CASES = [
    Case("Llama 2", "Llama", DENSE),
    Case("Llama 2", "Llama", {**DENSE, "attention_bias": True, "mlp_bias": True}, "with biases"),
    Case("Llama 2", "Llama", {**DENSE, **rope(1e4, rope_type="linear", factor=4.0)}, "linear"),
    Case("Llama 2", "Llama", {**DENSE, **rope(1e4, rope_type="yarn", **YARN), "head_dim": 32}, "YaRN"),
    Case("Llama 3.1", "Llama", {**DENSE, **rope(5e5, rope_type="llama3", **LLAMA3)}),
    Case(
        "Llama 3.1", "Llama", {**DENSE, **rope(5e5, rope_type="llama3", **LLAMA3), "tie_word_embeddings": True}, "tied"
    ),
    Case("Mistral", "Mistral", {**DENSE, **WINDOW}),
    Case("Mistral", "Mistral", {**DENSE, "sliding_window": None, "head_dim": 24}, "without a window"),
    Case("Mixtral", "Mixtral", {**DENSE, **MIXTRAL}),
    Case("Mixtral", "Mixtral", {**DENSE, **MIXTRAL, **WINDOW, "tie_word_embeddings": True}, "window, tied"),
    Case("Qwen2", "Qwen2", {**DENSE, "tie_word_embeddings": True}),
    Case("Qwen2", "Qwen2", {**DENSE, **WINDOW, "use_sliding_window": True, "max_window_layers": 1}, "window"),
    Case("Qwen3", "Qwen3", {**DENSE, "head_dim": 24}),
    Case("Qwen3", "Qwen3", {**DENSE, "attention_bias": True, "tie_word_embeddings": True}, "with biases, tied"),
    Case("Qwen3-MoE", "Qwen3Moe", {**DENSE, **EXPERTS, **NARROW, "head_dim": 24, "mlp_only_layers": [0]}),
    Case(
        "Qwen3-MoE",
        "Qwen3Moe",
        {**DENSE, **EXPERTS, **NARROW, "norm_topk_prob": True, "decoder_sparse_step": 2},
        "every 2nd",
    ),
    Case("Qwen3-MoE", "Qwen3Moe", {**DENSE, **EXPERTS, **NARROW, **WINDOW, "use_sliding_window": True}, "window"),
    # MiniMind publishes these in the formats of Llama and Qwen3.
    Case("MiniMind-2", "Llama", {**DENSE, **rope(1e6), "tie_word_embeddings": True}),
    Case("MiniMind-3", "Qwen3", {**DENSE, **rope(1e6), "head_dim": 24, "tie_word_embeddings": True}),
    Case(
        "MiniMind-3-MoE",
        "Qwen3Moe",
        {**DENSE, **rope(1e6), **TOP_1, "head_dim": 24, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    Case("Gemma 2", "Gemma2", {**DENSE, **WINDOW, **GEMMA2}),
    Case("OLMoE", "Olmoe", {**DENSE, **EXPERTS, "intermediate_size": 48}),
    Case("OLMoE", "Olmoe", {**DENSE, **EXPERTS, "attention_bias": True, "norm_topk_prob": True}, "with biases"),
    Case("GLM-4 MoE", "Glm4Moe", {**DENSE, **GROUPS, "use_qk_norm": True, "head_dim": 24}),
    Case(
        "GLM-4 MoE",
        "Glm4Moe",
        {**DENSE, **GROUPS, **WHOLE, "attention_bias": True, "norm_topk_prob": False},
        "whole heads",
    ),
]

pair = fixture(CASES)


@pytest.mark.parametrize("check", CHECKS)
def test_parity(pair: Pair, check: Callable[[Pair], None]) -> None:
    check(pair)


def test_shards_in_and_out(tmp_path: Path) -> None:
    """Folders of several files, theirs read by us and ours by them."""
    case = Case("Qwen3-MoE", "Qwen3Moe", {**DENSE, **EXPERTS, **NARROW})
    pair = Pair(case, tmp_path)
    pair.theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    ours = load_pretrained(tmp_path / "shards").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in pair.ours.state_dict().items())
    write_pretrained(tmp_path / "ours", pair.ours.config, lambda name, box: ours[name][box], max_shard_size=100_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    theirs = pair.theirs.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in loaded.state_dict().items())


def test_bf16_is_near_fp32(tmp_path: Path) -> None:
    pair = Pair(Case("Qwen3", "Qwen3", {**DENSE, "head_dim": 24}), tmp_path)
    half = load_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    with torch.no_grad():
        logits, expected = half(pair.tokens_BT), pair.theirs.to(torch.bfloat16)(pair.tokens_BT).logits
    assert logits.dtype == torch.bfloat16
    # Two implementations round at other places: 8 bits of mantissa, a few layers.
    assert (logits - expected).float().norm() < 0.02 * expected.float().norm()
