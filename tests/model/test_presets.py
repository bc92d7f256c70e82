"""Presets are the published architectures: their parameter counts are the published ones."""

import math
from decimal import Decimal

import pytest
import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from moray.model import ModelConfig
from moray.model.accounting.cost import count_parameters, parameters_by_part
from moray.model.presets import PRESETS, read_family

# As the hub counts the tensors of each model's files. DeepSeek's numbers are those without V3's multi-token prediction
# module and without routing biases, which are buffers here.
EXACT = {
    "minimind-3": 63_912_192,
    "minimind-3-moe": 198_416_640,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_419_200 - 58 * 256,
    "olmoe-1b-7b": 6_919_161_856,
    "gpt-neo-125m": 125_198_592,
    "gpt-neo-1.3b": 1_315_575_808,
    "gpt-neo-2.7b": 2_651_307_520,
    "gpt-neox-20b": 20_554_567_680,
}

# (total, active) with the digits that papers and model cards give them.
ROUNDED = {
    "minimind-3-moe": ("198.4M", "63.94M"),
    "minimind2-small": ("26M", "26M"),
    "minimind2": ("104M", "104M"),
    "minimind2-moe": ("145M", "92M"),
    "gpt3-125m": ("125M", "125M"),
    "gpt3-760m": ("760M", "760M"),
    "gpt3-1.3b": ("1.3B", "1.3B"),
    "gpt3-2.7b": ("2.7B", "2.7B"),
    "gpt3-6.7b": ("6.7B", "6.7B"),
    "gpt3-13b": ("13B", "13B"),
    "gpt3-175b": ("175B", "175B"),
    "llama3.1-405b": ("406B", "406B"),
    "mistral-7b": ("7.24B", "7.24B"),
    "mixtral-8x7b": ("46.7B", "12.9B"),
    "mixtral-8x22b": ("141B", "39B"),
    "qwen3-235b-a22b": ("235B", "22B"),
    "deepseek-v2": ("236B", "21B"),
    "olmoe-1b-7b": ("6.9B", "1.3B"),
    "gpt-neox-20b": ("20.6B", "20.6B"),
    "glam-64b-64e": ("1.2T", "96.6B"),
}


@pytest.mark.parametrize(("name", "parameters"), EXACT.items(), ids=EXACT)
def test_parameters_are_exactly_those_published(name: str, parameters: int) -> None:
    assert count_parameters(ModelConfig.preset(name)).total == parameters


@pytest.mark.parametrize(("name", "published"), ROUNDED.items(), ids=ROUNDED)
def test_parameters_round_to_those_published(name: str, published: tuple[str, str]) -> None:
    for count, text in zip(count_parameters(ModelConfig.preset(name)), published, strict=True):
        assert as_published(count, text) == text


def test_gpt3_350m_has_more_than_its_name_says() -> None:
    """24 layers of 12 d^2 + 13 d, two embeddings and a norm: 356M. GPT-2's medium model of the same shape has 355M."""
    d = 1024
    assert count_parameters(ModelConfig.preset("gpt3-350m")).total == (
        24 * (12 * d**2 + 13 * d) + (50257 + 2048) * d + 2 * d
    )


def test_gemma_2_without_its_embedding_has_what_its_report_says() -> None:
    """Table 2 of the report; the embedding there has 128 rows more, of padding."""
    published = {"gemma2-2b": 2_024_517_888, "gemma2-9b": 8_324_201_984, "gemma2-27b": 26_047_480_320}
    for name, parameters in published.items():
        parts = parameters_by_part(ModelConfig.preset(name))
        assert sum(part.total for part in parts.values()) - parts["embedding"].total == parameters


def test_where_the_active_parameters_leave_out_the_lookup() -> None:
    """DeepSeek-V3: 36.6B "including 0.9B for the output head" (README_WEIGHTS.md), 37B in the paper; V2-Lite: 2.4B,
    of 2.45B without the embedding."""
    without_lookup = {name: active_without_lookup(name) for name in ("deepseek-v3", "deepseek-v2-lite")}
    assert as_published(without_lookup["deepseek-v3"], "36.6B") == "36.6B"
    assert as_published(without_lookup["deepseek-v3"], "37B") == "37B"
    assert math.floor(without_lookup["deepseek-v2-lite"] / 1e8) == 24
    assert as_published(count_parameters(ModelConfig.preset("deepseek-v3")).total, "671B") == "671B"
    assert as_published(count_parameters(ModelConfig.preset("deepseek-v2-lite")).total, "15.7B") == "15.7B"


def test_qwen3_30b_cuts_its_active_parameters_off() -> None:
    """30.5B in total, 3.3B activated, of 3.353B; 29.9B without embedding and head."""
    total, active = count_parameters(ModelConfig.preset("qwen3-30b-a3b"))
    assert as_published(total, "30.5B") == "30.5B"
    assert math.floor(active / 1e8) == 33
    assert as_published(total - 2 * 151_936 * 2048, "29.9B") == "29.9B"


@pytest.mark.parametrize("experts", [8, 16, 32, 64, 128, 256])
def test_switch_base_is_the_decoder_of_its_t5_without_cross_attention(experts: int) -> None:
    """Of the hub's config; whole, with encoder and cross-attention, Switch-Base-8 has 619M."""
    theirs = SwitchTransformersConfig(
        d_ff=3072, num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, num_experts=experts
    )
    with torch.device("meta"):
        whole = SwitchTransformersForConditionalGeneration(theirs)
    left_out = ("EncDecAttention", ".layer.1.layer_norm", "relative_attention_bias")
    decoder = {name: p.numel() for name, p in whole.decoder.named_parameters() if not any(x in name for x in left_out)}
    ours = ModelConfig.preset(f"switch-base-{experts}")
    assert count_parameters(ours).total == sum(decoder.values())
    if experts == 8:
        assert as_published(sum(p.numel() for p in whole.parameters()), "619M") == "619M"


def test_switch_c_has_half_of_its_t5s_experts() -> None:
    """1,571B (table 9) lie in as many layers again of an encoder; experts are all but 0.1% of them."""
    config = ModelConfig.preset("switch-c-2048")
    assert 2 * parameters_by_part(config)["routed experts"].total == pytest.approx(1.571e12, rel=1e-3)


def test_every_preset_says_what_the_defaults_would_hide() -> None:
    for name, fields in PRESETS.items():
        assert {"vocab_size", "n_layers", "d_model", "max_seq_len", "tied_embeddings", "attention", "ffn"} <= set(
            fields
        )
        assert {"n_heads", "n_kv_heads", "head_dim"} <= set(fields["attention"]), name
        assert "position" in fields, name


def test_minimind_3_has_its_published_dimensions() -> None:
    dense, moe = ModelConfig.preset("minimind-3"), ModelConfig.preset("minimind-3-moe")
    for config in (dense, moe):
        assert (config.n_layers, config.d_model, config.ffn.width, config.vocab_size) == (8, 768, 2432, 6400)
        assert (config.attention.n_heads, config.attention.n_kv_heads, config.attention.head_dim) == (8, 4, 96)
        assert (config.position.theta, config.norm.eps, config.attention.qk_norm) == (1e6, 1e-6, "head")
        assert config.tied_embeddings
    assert moe.moe
    assert (moe.moe.n_experts, moe.moe.top_k, moe.moe.expert_width, moe.moe.n_shared) == (4, 1, 2432, 0)
    assert (moe.moe.score, moe.moe.normalise_gates, moe.moe.balance_loss, moe.n_moe_layers) == (
        "softmax",
        True,
        5e-4,
        8,
    )


def test_demo_moe_has_every_part_of_deepseek_v3() -> None:
    config = ModelConfig.preset("demo-moe")
    moe = config.moe
    assert moe
    assert moe.score == "sigmoid"
    assert 0 < moe.n_dense_layers < config.n_layers
    assert moe.n_shared
    assert moe.expert_width < config.ffn.width, "experts are fine-grained"
    assert moe.top_k_groups < moe.n_groups, "routing is device-limited"
    assert moe.bias_update_rate > 0


def test_gemma_2_scales_by_its_width() -> None:
    """embedding_scale is sqrt(d_model); scores are divided by sqrt(query_pre_attn_scalar), 256, 256 and 144."""
    for name, scalar in (("gemma2-2b", 256), ("gemma2-9b", 256), ("gemma2-27b", 144)):
        config = ModelConfig.preset(name)
        assert config.embedding_scale == math.sqrt(config.d_model)
        assert config.attention.scale == pytest.approx(scalar**-0.5, rel=1e-15)
        assert [config.attention.is_local(layer) for layer in range(3)] == [True, False, True]


def test_changes_replace_the_presets_fields_however_deep() -> None:
    config = ModelConfig.preset("demo-moe", n_layers=2, vocab_size=512, moe={"top_k": 2})
    preset = ModelConfig.preset("demo-moe")
    assert config.moe
    assert preset.moe
    assert (config.n_layers, config.vocab_size, config.moe.top_k) == (2, 512, 2)
    assert (config.d_model, config.moe.n_experts) == (preset.d_model, preset.moe.n_experts)
    assert ModelConfig.preset("demo-moe") == preset, "the preset itself stays as it is"


def test_a_family_shares_a_base_and_a_preset_may_start_from_another() -> None:
    text = """
        base = { d_model = 8, attention = { n_heads = 2 } }
        [one]
        n_layers = 1
        [two]
        like = "one"
        attention.n_kv_heads = 1
    """
    assert read_family(text) == {
        "one": {"d_model": 8, "attention": {"n_heads": 2}, "n_layers": 1},
        "two": {"d_model": 8, "attention": {"n_heads": 2, "n_kv_heads": 1}, "n_layers": 1},
    }


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^model\.preset=minimind-3moe is not known; did you mean minimind-3-moe\?$"):
        ModelConfig.preset("minimind-3moe")
    with pytest.raises(ValueError, match=r"there are .*demo-dense, demo-moe.*minimind-3, minimind-3-moe"):
        ModelConfig.preset("xxxxxxxx")


def as_published(count: int, text: str) -> str:
    """The count with as many digits after the point, and in the same unit, as the text."""
    number, unit = text[:-1], text[-1]
    exponent = {"M": 6, "B": 9, "T": 12}[unit]
    places = -Decimal(number).as_tuple().exponent  # type: ignore[operator]
    return f"{count / 10**exponent:.{places}f}{unit}"


def active_without_lookup(name: str) -> int:
    config = ModelConfig.preset(name)
    return count_parameters(config).active - parameters_by_part(config)["embedding"].total
