"""A config that makes no sense is refused in one sentence: the setting, its value, and what would be right."""

from typing import Any

import pytest
from pydantic import ValidationError

from moray.model import ModelConfig
from moray.model.config.parts import merge

MOE = {"n_experts": 8, "top_k": 2, "expert_width": 16}
NOISY = MOE | {"noisy": True}
LATENT = {"kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 6}
MLA = {"n_heads": 4, "n_kv_heads": 4, "head_dim": 12, "latent": LATENT}
LINEAR = {"kind": "linear", "factor": 2.0}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 64}


def refusal(**fields: Any) -> str:
    with pytest.raises(ValueError, match=r"model\.") as error:
        ModelConfig(**fields)
    return str(error.value)


def at(path: str, value: Any, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """The base's fields with that one changed: at("moe.top_k", 0)."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return merge(base or {}, value)


BASES: dict[str, dict[str, Any]] = {
    "moe": {"moe": MOE},
    "attention.latent": {"attention": MLA},
    "position.scaling": {"position": {"scaling": LLAMA3}},
}
AT_LEAST_1 = (
    *("vocab_size", "n_layers", "d_model", "max_seq_len", "ffn.width"),
    *(f"attention.{name}" for name in ("n_heads", "n_kv_heads", "head_dim", "window")),
    *(f"attention.latent.{name}" for name in ("kv_rank", "q_rank", "nope_dim", "rope_dim", "value_dim")),
    *("position.scaling.factor", "position.scaling.original_max_seq_len"),
)
AT_LEAST_0 = (
    *("z_loss", "ffn.conv_width", "ffn.adapter_rank", "moe.n_shared", "moe.n_dense_layers", "moe.bias_update_rate"),
    *(f"moe.{name}_loss" for name in ("balance", "device", "communication", "importance", "load", "router_z")),
)
ABOVE_0 = (
    *("embedding_scale", "final_softcap", "norm.eps", "init.std"),
    *("attention.scale", "attention.softcap", "moe.gate_scale", "moe.capacity_factor"),
    *(f"position.scaling.{name}" for name in ("low_freq_factor", "beta_fast", "beta_slow", "attention_factor")),
)


def based(path: str, value: float) -> dict[str, Any]:
    return at(path, value, next((base for prefix, base in BASES.items() if path.startswith(f"{prefix}.")), None))


@pytest.mark.parametrize("name", AT_LEAST_1)
def test_sizes_are_at_least_1(name: str) -> None:
    assert f"model.{name}=0 must be at least 1" in refusal(**based(name, 0)).replace(".0 must", " must")


@pytest.mark.parametrize("name", AT_LEAST_0)
def test_factors_are_0_or_more(name: str) -> None:
    assert f"model.{name}=-1 must be at least 0" in refusal(**based(name, -1)).replace(".0 must", " must")


@pytest.mark.parametrize("value", [0.0, -1.0])
@pytest.mark.parametrize("name", ABOVE_0)
def test_scales_are_more_than_0(name: str, value: float) -> None:
    assert f"model.{name}={value} must be more than 0" in refusal(**based(name, value))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            at("attention", {"n_heads": 6, "n_kv_heads": 4}),
            "model.attention.n_kv_heads=4 must divide n_heads=6; try one of [1, 2, 3, 6]",
        ),
        (at("attention.pattern", ()), "model.attention.pattern is empty; try local,global"),
        (at("attention.head_dim", 7), "model.attention.head_dim=7 must be even: RoPE turns pairs of channels"),
        (at("position.rotary_dim", 3), "model.position.rotary_dim=3 must be even and at least 2"),
        (at("position.theta", 1), "model.position.theta=1.0 must be more than 1"),
        (at("position.theta", -1), "model.position.theta=-1.0 must be more than 1"),
        (
            {"moe": MOE, **at("ffn.conv_width", 3)},
            "model.ffn.conv_width=3 is of dense layers, and every layer has experts; set it to 0, or mod",
        ),
        (
            {"moe": MOE, **at("ffn.adapter_rank", 4)},
            "model.ffn.adapter_rank=4 is of dense layers, and every layer has experts",
        ),
        (at("position.rotary_dim", 0), "model.position.rotary_dim=0 must be even and at least 2"),
        (at("position.rotary_dim", 98), "model.position.rotary_dim=98 is too much; at most head_dim=96"),
        (
            at("ffn", {"conv_width": 3, "adapter_rank": 4}),
            "model.ffn.adapter_rank=4 stands in the place of conv_width=3: set one of them to 0",
        ),
        (at("head_bias", True), "model.head_bias=true needs model.tied_embeddings=false"),
        (
            {"residual": "parallel", "norm": {"placement": "sandwich"}},
            "model.residual=parallel needs model.norm.placement=pre; it is sandwich",
        ),
    ],
)
def test_a_dense_model_that_does_not_fit_together_is_told_why(fields: dict[str, Any], message: str) -> None:
    assert message in refusal(**fields)


@pytest.mark.parametrize(
    ("scaling", "position", "message"),
    [
        (
            LINEAR,
            {"kind": "learned"},
            "model.position.scaling needs model.position.kind=rope; it is learned",
        ),
        (
            {"kind": "llama3", "factor": 8.0},
            {},
            "model.position.scaling.original_max_seq_len is missing: llama3 needs the length trained on before",
        ),
        (
            {"kind": "yarn", "factor": 8.0},
            {},
            "model.position.scaling.original_max_seq_len is missing: yarn needs the length trained on before",
        ),
        (
            LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 4.0},
            {},
            "model.position.scaling.high_freq_factor=4.0 must be more than low_freq_factor=4.0",
        ),
        (
            {"kind": "yarn", "factor": 8.0, "original_max_seq_len": 64, "beta_fast": 1.0, "beta_slow": 32.0},
            {},
            "model.position.scaling.beta_fast=1.0 must be more than beta_slow=32.0",
        ),
        (LINEAR | {"factor": 0.5}, {}, "model.position.scaling.factor=0.5 must be at least 1"),
    ],
)
def test_a_scaling_of_rope_is_whole(scaling: dict[str, Any], position: dict[str, Any], message: str) -> None:
    assert message in refusal(position={**position, "scaling": scaling})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (at("attention.head_dim", 16), "model.attention.head_dim=16 must be latent.nope_dim + latent.rope_dim = 12"),
        (at("attention.n_kv_heads", 2), "model.attention.n_kv_heads=2 must be n_heads=4 with latent attention"),
        (at("attention.latent.rope_dim", 5), "model.attention.latent.rope_dim=5 must be even"),
        (at("attention.qk_norm", "head"), "model.attention.qk_norm=head does not go with latent attention"),
        (at("attention.window", 8), "model.attention.window=8 does not go with latent attention; leave it None"),
        (at("attention.qkv_bias", True), "model.attention.qkv_bias=True does not go with latent attention"),
        (at("attention.softcap", 50.0), "model.attention.softcap=50.0 does not go with latent attention"),
        (at("position.kind", "learned"), "model.position.kind=learned does not go with latent attention; use rope"),
        (at("position.kind", None), "model.position.kind=None does not go with latent attention; use rope"),
        (
            at("position.rotary_dim", 4),
            "model.position.rotary_dim=4 is too much; leave it out with latent attention",
        ),
    ],
)
def test_latent_attention_that_does_not_fit_together_is_told_why(fields: dict[str, Any], message: str) -> None:
    assert message in refusal(**merge({"attention": MLA}, fields))


# What contradicts itself inside MoEConfig is in test_moe_config.py, but for these.
@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (MOE | {"jitter": -0.1}, "model.moe.jitter=-0.1 must be 0 (none) or more, and less than 1"),
        (
            NOISY | {"n_groups": 4, "load_loss": 0.1},
            "model.moe.load_loss=0.1 knows the noise alone: it needs top_k_groups=1 to be n_groups=4",
        ),
        (NOISY | {"normalise_gates": False}, "model.moe.noisy=true is a softmax over the top-k"),
        (
            MOE | {"communication_loss": 0.1},
            "model.moe.communication_loss=0.1 balances groups of experts: it needs n_groups > 1",
        ),
        (MOE | {"n_dense_layers": 8}, "model.moe.n_dense_layers=8 and every=1 leave none of n_layers=8 layers experts"),
        (
            MOE | {"every": 9},
            "model.moe.n_dense_layers=0 and every=9 leave none of n_layers=8 layers experts; lower them",
        ),
    ],
)
def test_experts_that_do_not_fit_together_are_told_why(moe: dict[str, Any], message: str) -> None:
    assert message in refusal(moe=moe)


def test_a_model_with_experts_has_rows_of_16_bytes() -> None:
    assert "model.d_model=36 must be a multiple of 8 in a model with experts" in refusal(d_model=36, moe=MOE)
    assert "try 40" in refusal(d_model=36, moe=MOE)
    assert ModelConfig(d_model=36).d_model == 36


def test_unknown_fields_and_wrong_types_are_refused() -> None:
    for path, value in (
        ("n_layer", 2),
        ("n_layers", "many"),
        ("n_layers", 2.5),
        ("attention.heads", 2),
        ("norm.kind", "batchnorm"),
        ("moe.score", "tanh"),
    ):
        with pytest.raises(ValidationError, match=path.rpartition(".")[2]):
            ModelConfig(**at(path, value, {"moe": MOE}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [*ABOVE_0, "z_loss", "moe.balance_loss", "moe.jitter"])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        ModelConfig(**based(name, value))


@pytest.mark.parametrize("part", ["norm", "position", "attention", "ffn", "init", "moe"])
def test_a_config_is_frozen_in_all_its_parts(part: str) -> None:
    config = ModelConfig(moe=MOE)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, part, None)
    held = getattr(config, part)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(held, next(iter(type(held).model_fields)), None)


def test_changes_go_as_deep_as_the_config_and_are_checked_again() -> None:
    config = ModelConfig(moe=MOE, attention=MLA)  # type: ignore[arg-type]
    changed = config.but(attention={"latent": {"q_rank": 6}}, moe={"top_k": 3})
    assert changed.attention.latent
    assert (changed.attention.latent.q_rank, changed.attention.latent.kv_rank) == (6, 16)
    assert changed.moe
    assert (changed.moe.top_k, changed.moe.n_experts) == (3, 8)
    assert config.but(moe=None).n_experts == 0
    with pytest.raises(ValueError, match=r"model\.moe\.top_k=9 must be at most 8"):
        config.but(moe={"top_k": 9})


def test_which_layers_have_experts() -> None:
    first_dense = ModelConfig(n_layers=5, moe=MOE | {"n_dense_layers": 2})  # type: ignore[arg-type]
    every_second = ModelConfig(n_layers=5, moe=MOE | {"every": 2})  # type: ignore[arg-type]
    assert [first_dense.is_moe_layer(layer) for layer in range(5)] == [False, False, True, True, True]
    assert [every_second.is_moe_layer(layer) for layer in range(5)] == [False, True, False, True, False]
    assert (first_dense.n_moe_layers, every_second.n_moe_layers, ModelConfig().n_moe_layers) == (3, 2, 0)


def test_which_layers_see_a_window() -> None:
    def local(**attention: Any) -> list[bool]:
        config = ModelConfig(attention=attention)  # type: ignore[arg-type]
        return [config.attention.is_local(layer) for layer in range(4)]

    assert local(window=8) == [True] * 4
    assert local(window=8, pattern=("global", "local")) == [False, True, False, True]
    assert local(window=8, pattern="local,local,global") == [True, True, False, True]
    assert local(pattern=("local",)) == [False] * 4


def test_which_channels_rope_turns() -> None:
    assert ModelConfig(attention=MLA).rotary_dim == 4  # type: ignore[arg-type]
    assert ModelConfig(position={"rotary_dim": 24}).rotary_dim == 24  # type: ignore[arg-type]
    assert ModelConfig().rotary_dim == ModelConfig().attention.head_dim
