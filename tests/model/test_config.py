"""A config that makes no sense is refused in one sentence: the setting, its value, and what would be right."""

import pytest
from pydantic import ValidationError

from model import ModelConfig

MOE = {"n_experts": 8, "top_k": 2, "d_expert": 16}
AT_LEAST_1 = ("vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_seq_len")


def refusal(**fields: object) -> str:
    with pytest.raises(ValueError, match=r"model\.") as error:
        ModelConfig(**fields)  # type: ignore[arg-type]
    return str(error.value)


@pytest.mark.parametrize("name", AT_LEAST_1)
def test_sizes_are_at_least_1(name: str) -> None:
    assert f"model.{name}=0 must be at least 1" in refusal(**{name: 0})


@pytest.mark.parametrize("name", ["top_k", "d_expert", "n_expert_groups", "top_k_groups"])
def test_sizes_of_a_moe_layer_are_at_least_1(name: str) -> None:
    assert f"model.{name}=0 must be at least 1" in refusal(**{**MOE, name: 0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 6, "n_kv_heads": 4}, "model.n_kv_heads=4 must divide n_heads=6; try one of [1, 2, 3, 6]"),
        ({"rope_theta": 0.0}, "model.rope_theta=0.0 must be more than 0"),
        ({"norm_eps": -1e-6}, "model.norm_eps=-1e-06 must be more than 0"),
        ({"init_std": 0.0}, "model.init_std=0.0 must be more than 0"),
        ({**MOE, "gate_scale": 0.0}, "model.gate_scale=0.0 must be more than 0"),
        ({**MOE, "n_shared_experts": -1}, "model.n_shared_experts=-1 must be 0 or more"),
        ({**MOE, "balance_loss": -0.1}, "model.balance_loss=-0.1 must be 0 or more"),
        ({**MOE, "bias_update_rate": -0.1}, "model.bias_update_rate=-0.1 must be 0 or more"),
        ({**MOE, "d_expert": 20}, "model.d_expert=20 must be a multiple of 8 in a model with experts"),
        ({**MOE, "d_model": 36}, "model.d_model=36 must be a multiple of 8 in a model with experts"),
        ({"head_dim": 7}, "model.head_dim=7 must be even"),
        ({"n_experts": -1}, "model.n_experts=-1 must be 0 (dense) or more"),
        ({**MOE, "n_dense_layers": 8}, "model.n_dense_layers=8 must lie between 0 and n_layers - 1 = 7"),
        ({**MOE, "n_dense_layers": -1}, "model.n_dense_layers=-1 must lie between 0 and n_layers - 1 = 7"),
        ({**MOE, "n_expert_groups": 3}, "model.n_expert_groups=3 must divide n_experts=8; try one of [1, 2, 4, 8]"),
        ({**MOE, "n_expert_groups": 2, "top_k_groups": 3}, "model.top_k_groups=3 must be at most n_expert_groups=2"),
        ({**MOE, "top_k": 9}, "model.top_k=9 must be at most 8, the experts in 1 of 1 groups of n_experts=8"),
        ({**MOE, "top_k": 3, "n_expert_groups": 4}, "model.top_k=3 must be at most 2, the experts in 1 of 4 groups"),
        ({**MOE, "n_expert_groups": 8, "top_k_groups": 2}, "n_expert_groups=8 leaves one: use max"),
    ],
)
def test_what_does_not_fit_together_is_named(fields: dict[str, object], message: str) -> None:
    assert message in refusal(**fields)


def test_unknown_fields_and_wrong_types_are_refused() -> None:
    for fields in ({"n_layer": 2}, {"n_layers": "many"}, {"n_layers": 2.5}, {"score_function": "tanh"}):
        with pytest.raises(ValidationError, match=next(iter(fields))):
            ModelConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["rope_theta", "norm_eps", "init_std", "gate_scale", "balance_loss"])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        ModelConfig(**{name: value})  # type: ignore[arg-type]


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig().n_layers = 3  # type: ignore[misc]


def test_a_dense_config_asks_nothing_of_its_expert_fields() -> None:
    assert ModelConfig(n_experts=0, top_k=5, n_dense_layers=99).n_moe_layers == 0


def test_the_first_layers_are_dense() -> None:
    config = ModelConfig(**MOE, n_layers=5, n_dense_layers=2)
    assert [config.is_moe_layer(layer) for layer in range(5)] == [False, False, True, True, True]
    assert config.n_moe_layers == 3
