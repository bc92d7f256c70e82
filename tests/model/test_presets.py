"""Presets are the published architectures, and a wrong name is answered with the nearest."""

import pytest

from model import ModelConfig


@pytest.mark.parametrize("name", ["minimind-3", "minimind-3-moe"])
def test_minimind_3_has_its_published_dimensions(name: str) -> None:
    config = ModelConfig.preset(name)
    assert (config.n_layers, config.d_model, config.d_ff, config.vocab_size) == (8, 768, 2432, 6400)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (8, 4, 96)
    assert (config.rope_theta, config.norm_eps) == (1e6, 1e-6)
    assert config.qk_norm
    assert config.tied_embeddings


def test_minimind_3_moe_has_its_published_experts() -> None:
    config = ModelConfig.preset("minimind-3-moe")
    assert (config.n_experts, config.top_k, config.d_expert, config.n_shared_experts) == (4, 1, 2432, 0)
    assert (config.score_function, config.balance_loss, config.n_moe_layers) == ("softmax", 5e-4, 8)


def test_demo_moe_has_every_part_of_deepseek_v3() -> None:
    config = ModelConfig.preset("demo-moe")
    assert config.score_function == "sigmoid"
    assert 0 < config.n_dense_layers < config.n_layers
    assert config.n_shared_experts
    assert config.d_expert < config.d_ff, "experts are fine-grained"
    assert config.top_k_groups < config.n_expert_groups, "routing is device-limited"
    assert config.bias_update_rate > 0


def test_changes_replace_the_presets_fields() -> None:
    config = ModelConfig.preset("demo-dense", n_layers=2, vocab_size=512)
    assert (config.n_layers, config.vocab_size, config.n_experts) == (2, 512, 0)
    assert config.d_model == ModelConfig.preset("demo-dense").d_model


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^model\.preset=minimind-3moe is not known; did you mean minimind-3-moe\?$"):
        ModelConfig.preset("minimind-3moe")
    with pytest.raises(ValueError, match=r"there are minimind-3, minimind-3-moe, demo-dense, demo-moe"):
        ModelConfig.preset("xxxxxxxx")
