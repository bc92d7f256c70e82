"""config.json as published, of the families that Llama is not the root of: read whole, or refused by name."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from moray.model import ModelConfig
from moray.model.hf import read_config
from moray.model.hf.choice import essence, family_for
from moray.model.tensors import tensor_shapes

SUMMARY = {
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
}
GPT2: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
    **SUMMARY,
}
STARCODER: dict[str, Any] = {
    **{name: value for name, value in GPT2.items() if name != "n_ctx"},
    "activation_function": "gelu",
    "architectures": ["GPTBigCodeForCausalLM"],
    "attention_softmax_in_fp32": True,
    "inference_runner": 0,
    "max_batch_size": None,
    "max_sequence_length": None,
    "model_type": "gpt_bigcode",
    "multi_query": True,
    "n_embd": 6144,
    "n_head": 48,
    "n_inner": 24576,
    "n_layer": 40,
    "n_positions": 8192,
    "pad_key_length": True,
    "pre_allocate_kv_cache": False,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "use_cache": True,
    "validate_runner_input": True,
    "vocab_size": 49152,
}
GPT_NEO: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPTNeoForCausalLM"],
    "attention_dropout": 0,
    "attention_layers": ["global", "local"] * 12,
    "attention_types": [[["global", "local"], 12]],
    "embed_dropout": 0,
    "gradient_checkpointing": False,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neo",
    "num_heads": 16,
    "num_layers": 24,
    "resid_dropout": 0,
    "tokenizer_class": "GPT2Tokenizer",
    "use_cache": True,
    "vocab_size": 50257,
    "window_size": 256,
    **SUMMARY,
}
GPT_NEOX: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_act": "gelu_fast",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 24576,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 64,
    "num_hidden_layers": 44,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 50432,
}
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
DEEPSEEK_V2: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
DEEPSEEK_V2_LITE = {
    **DEEPSEEK_V2,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
}
DEEPSEEK_V3 = {
    **DEEPSEEK_V2,
    "architectures": ["DeepseekV3ForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def read(folder: Path, values: dict[str, Any], **changes: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(values | changes))
    return read_config(folder)


@pytest.mark.parametrize(
    ("preset", "values"),
    [
        ("gpt-neo-1.3b", GPT_NEO),
        ("gpt-neox-20b", GPT_NEOX),
        ("deepseek-v2", DEEPSEEK_V2),
        ("deepseek-v2-lite", DEEPSEEK_V2_LITE),
        ("deepseek-v3", DEEPSEEK_V3),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_files_are_the_presets(preset: str, values: dict[str, Any], tmp_path: Path) -> None:
    assert essence(read(tmp_path, values)) == essence(ModelConfig.preset(preset))


@pytest.mark.parametrize(
    ("values", "count"), [(GPT2, 124_439_808), (STARCODER, 15_517_456_384)], ids=["gpt2", "starcoder"]
)
def test_published_files_have_the_published_size(values: dict[str, Any], count: int, tmp_path: Path) -> None:
    assert sum(math.prod(shape) for shape in tensor_shapes(read(tmp_path, values)).values()) == count


@pytest.mark.parametrize(
    ("preset", "model_type"),
    [
        ("gpt3-175b", "gpt2"),
        ("gpt-neo-2.7b", "gpt_neo"),
        ("gpt-neox-20b", "gpt_neox"),
        ("deepseek-v2-lite", "deepseek_v2"),
        ("deepseek-v3", "deepseek_v3"),
        ("minimind2", "llama"),
        ("minimind2-moe", "minimind"),
    ],
)
def test_presets_have_a_family_whose_config_says_the_same(preset: str, model_type: str) -> None:
    config = ModelConfig.preset(preset)
    family = family_for(config)
    assert family.model_type == model_type
    assert essence(family.read(json.loads(json.dumps(family.write(config))))) == essence(config)


def test_multi_query_without_rope_is_bigcode() -> None:
    assert family_for(ModelConfig.preset("gpt3-125m", attention={"n_kv_heads": 1})).model_type == "gpt_bigcode"


def test_balance_loss_of_deepseek(tmp_path: Path) -> None:
    moe = read(tmp_path, DEEPSEEK_V2).moe
    assert moe
    assert (moe.balance_loss, moe.balance_over, moe.group_size) == (0.001, "layer", 1)


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention=True"),
        (GPT2, {"activation_function": "mish"}, "activation_function='mish'"),
        (GPT2, {"n_head": 7}, "n_head=7"),
        (STARCODER, {"num_key_value_heads": 4}, "num_key_value_heads=4"),
        (STARCODER, {"add_cross_attention": True}, "add_cross_attention=True"),
        (GPT_NEO, {"attention_types": [[["global", "banded"], 12]]}, "attention_types"),
        (GPT_NEO, {"num_layers": 6}, "num_layers=6"),
        (GPT_NEO, {"attention_layers": ["local"] * 24}, "attention_layers"),
        (GPT_NEOX, {"rope_theta": 5e5}, "rotary_emb_base=10000"),
        (GPT_NEOX, {"partial_rotary_factor": 0.5}, "rotary_pct=0.25"),
        (GPT_NEOX, {"use_alibi": True}, "use_alibi=True"),
        (DEEPSEEK_V2, {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        (DEEPSEEK_V2, {"topk_group": None}, "topk_method='group_limited_greedy'"),
        (DEEPSEEK_V2, {"norm_topk_prob": True}, "norm_topk_prob=True"),
        (DEEPSEEK_V2, {"attention_bias": True}, "attention_bias=True"),
        (DEEPSEEK_V2, {"n_shared_experts": 0}, "n_shared_experts=0"),
        (DEEPSEEK_V2, {"mlp_bias": True}, "mlp_bias=True"),
        (DEEPSEEK_V2, {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        (DEEPSEEK_V2, {"num_key_value_heads": 8}, "num_key_value_heads=8"),
        (DEEPSEEK_V2, {"topk_group": 9}, "model.moe.top_k_groups=9"),
        (DEEPSEEK_V3, {"quantization_config": FP8}, "quantization_config={'activation_scheme'"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method='greedy'"),
        (DEEPSEEK_V3, {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers=2"),
        (DEEPSEEK_V3, {"index_topk": 2048}, "index_topk=2048"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) == 1 else "",
)
def test_what_would_be_ignored_is_refused_by_name(
    values: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path, values, **changes)
