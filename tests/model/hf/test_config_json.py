"""config.json: published ones are read as published, and nothing that changes the mathematics is ever ignored."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from moray.model import ModelConfig
from moray.model.accounting.cost import count_parameters
from moray.model.hf import read_config
from moray.model.hf.choice import essence, family_for
from moray.model.presets import PRESETS

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "bos_token_id": 1,
    "initializer_range": 0.01,
    "transformers_version": "4.31.0",
}
SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 8, "max_window_layers": 2}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def read(folder: Path, values: dict[str, Any], **changes: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(values | changes))
    return read_config(folder)


def test_fields_become_ours(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA)
    assert (config.vocab_size, config.d_model, config.n_layers, config.max_seq_len) == (128, 64, 2, 64)
    assert (config.attention.n_heads, config.attention.n_kv_heads, config.attention.head_dim) == (4, 2, 16)
    assert (config.ffn.width, config.norm.eps, config.position.theta) == (160, 1e-5, 5e5)
    assert (config.init.std, config.tied_embeddings, config.moe) == (0.01, False, None)


@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear"])
def test_both_generations_say_the_same(tmp_path: Path, kind: str) -> None:
    scaling = {
        "llama3": SCALING,
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16, "truncate": False},
        "linear": {"factor": 2.0},
    }[kind]
    old = read(tmp_path, LLAMA, rope_scaling={"type": kind, **scaling})
    new = {name: value for name, value in LLAMA.items() if name != "rope_theta"}
    both = {"rope_type": kind, "rope_theta": 5e5, **scaling}
    assert read(tmp_path, new, rope_parameters=both, pad_token_id=None) == old
    assert old.position.scaling
    assert old.position.scaling.kind == kind
    assert old.position.scaling.factor == scaling["factor"]


def test_the_length_before_scaling_is_max_position_embeddings_where_it_is_not_given(tmp_path: Path) -> None:
    scaling = read(tmp_path, LLAMA, rope_scaling={"rope_type": "yarn", "factor": 2.0}).position.scaling
    assert scaling
    assert scaling.original_max_seq_len == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_gate": "hard"}, "mlp_gate='hard'"),
        ({"logit_scale": 0.0625, "residual_multiplier": 0.22}, "logit_scale=0.0625, residual_multiplier=0.22"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; moray computes hidden_act='silu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type='dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "rope_scaling.rope_type='longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling of rope_type=linear has no factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 8}}, "rope_scaling.beta_fast=8"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "model.position.scaling.factor=0.5"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "otherwise"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"model_type": "t5"}, "model_type='t5' is not supported; there are "),
        ({"num_key_value_heads": 3}, "model.attention.n_kv_heads=3 must divide n_heads=4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_ignored_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path, LLAMA, **changes)


def test_what_is_off_or_harmless_is_not_refused(tmp_path: Path) -> None:
    off = {"clip_qkv": None, "use_parallel": False, "extras": [], "attention_dropout": 0.1, "top_k": 50}
    assert read(tmp_path, LLAMA, **off) == read(tmp_path, LLAMA)


@pytest.mark.parametrize(
    "model_type",
    ["llama", "mistral", "qwen2", "qwen3", "gemma2", "mixtral", "olmoe", "qwen3_moe", "glm4_moe"],
)
@pytest.mark.parametrize("silent", [{"num_key_value_heads"}, {"head_dim"}, {"num_key_value_heads", "head_dim"}])
def test_heads_are_transformers_where_the_file_is_silent(tmp_path: Path, model_type: str, silent: set[str]) -> None:
    """Each family has its own defaults: 8 key heads, 4, 32, or as many as heads; widths of 128, 256, or a share."""
    kind = CONFIG_MAPPING[model_type]
    stated = kind(hidden_size=6144, num_attention_heads=64, num_key_value_heads=16).to_dict() | {"head_dim": 96}
    said = {name: value for name, value in stated.items() if name not in silent}
    theirs, ours = kind.from_dict(said), read(tmp_path, said).attention
    width = getattr(theirs, "head_dim", None) or 6144 // 64
    assert (ours.n_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, width)


def test_smollm2_as_published(tmp_path: Path) -> None:
    """By nanotron's word a Llama, which it says in fields of its own."""
    config = read(tmp_path, SMOLLM2)
    assert count_parameters(config).total == 134_515_008
    with pytest.raises(ValueError, match=r"fields that moray does not know .*: rope_interleaved=True"):
        read(tmp_path, SMOLLM2, rope_interleaved=True)


def test_a_missing_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json has no hidden_size"):
        read(tmp_path, {name: value for name, value in LLAMA.items() if name != "hidden_size"})
    with pytest.raises(ValueError, match=r"is no Hugging Face folder: it has no config\.json"):
        read_config(tmp_path / "nowhere")


def test_windows_of_qwen(tmp_path: Path) -> None:
    assert read(tmp_path, QWEN2).attention.window is None
    late = read(tmp_path, QWEN2, use_sliding_window=True)
    assert [late.attention.is_local(layer) for layer in range(4)] == [False, False, True, True]
    types = ["sliding_attention", "full_attention"] * 2
    alternating = read(tmp_path, QWEN2, use_sliding_window=True, layer_types=types)
    assert (alternating.attention.window, alternating.attention.pattern) == (8, ("local", "global"))
    with pytest.raises(ValueError, match="layer_types"):
        read(tmp_path, QWEN2, layer_types=types)


def test_dense_layers_come_first(tmp_path: Path) -> None:
    sparse = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0, 1]}
    moe = read(tmp_path, {**LLAMA, **sparse, "model_type": "qwen3_moe", "num_hidden_layers": 4}).moe
    assert moe
    assert (moe.n_dense_layers, moe.every) == (2, 1)
    # The default coefficient, once for each of the experts that a token chooses.
    assert (moe.balance_loss, moe.balance_over) == (0.002, "model")
    with pytest.raises(ValueError, match=r"mlp_only_layers=\[3\]"):
        read(tmp_path, {**LLAMA, **sparse, "model_type": "qwen3_moe", "num_hidden_layers": 4, "mlp_only_layers": [3]})


EXPECTED = {
    "llama2-70b": "llama",
    "llama3.1-405b": "llama",
    "mistral-7b": "mistral",
    "mixtral-8x22b": "mixtral",
    "gemma2-27b": "gemma2",
    "qwen3-235b-a22b": "qwen3_moe",
    "olmoe-1b-7b": "olmoe",
    "minimind-3": "qwen3",
    "minimind-3-moe": "qwen3_moe",
    "demo-dense": "qwen3",
    "demo-moe": "glm4_moe",
}


@pytest.mark.parametrize(("preset", "model_type"), EXPECTED.items())
def test_presets_have_a_family_whose_config_says_the_same(preset: str, model_type: str) -> None:
    assert preset in PRESETS
    config = ModelConfig.preset(preset)
    family = family_for(config)
    assert family.model_type == model_type
    assert essence(family.read(json.loads(json.dumps(family.write(config))))) == essence(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": {"kind": "crmsnorm"}}, "model.norm.kind=crmsnorm would be rmsnorm"),
        ({"ffn": {"activation": "relu2"}}, "model.ffn.activation=relu2 would be silu"),
        ({"ffn": {"conv_width": 3}}, "model.ffn.conv_width=3 would be 0"),
        ({"attention": {"qk_norm": None, "output_bias": True}, "head_bias": True, "tied_embeddings": False}, "bias"),
    ],
)
def test_what_no_family_expresses_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="no Hugging Face family expresses this model") as error:
        family_for(ModelConfig.preset("demo-dense", **changes))
    assert message in str(error.value)


def test_a_routing_bias_that_learns_needs_a_family_that_has_one() -> None:
    config = ModelConfig.preset("minimind-3-moe", moe={"bias_update_rate": 1e-3})
    with pytest.raises(ValueError, match=r"router\.bias_E"):
        family_for(config)


def test_heads_that_do_not_divide_the_width_are_no_llama() -> None:
    """transformers 5 refuses such a Llama; a Mistral without a window is the same function."""
    config = ModelConfig.preset("llama2-7b", d_model=4100)
    assert family_for(config).model_type == "mistral"


def test_ntk_aware_scaling_is_a_larger_base() -> None:
    config = ModelConfig.preset("llama2-7b", position={"scaling": {"kind": "ntk", "factor": 4.0}})
    written = family_for(config).write(config)
    # theta * factor^(d / (d - 2)), d = 128
    assert written["rope_theta"] == pytest.approx(1e4 * 4 ** (128 / 126))
    assert written["rope_scaling"] is None


def test_settings_of_training_do_not_stand_in_the_way() -> None:
    training = {"noisy": True, "capacity_factor": 1.25, "router_z_loss": 1e-3, "group_size": 4, "balance_loss": 0.1}
    assert family_for(ModelConfig.preset("minimind-3-moe", z_loss=1e-4, moe=training)).model_type == "qwen3_moe"
