"""Initial weights depend on (config, seed, name) alone: not on order, not on who draws which part."""

import math
from typing import Any

import pytest
import torch

from moray.model import Decoder, ModelConfig, initialise
from moray.model.init import initial_tensor

NARROW: dict[str, Any] = {
    "n_layers": 3,
    "d_model": 32,
    "vocab_size": 300,
    "ffn": {"width": 48},
    "moe": {"n_experts": 8, "expert_width": 16},
}
MOE = ModelConfig.preset("demo-moe", **NARROW)
WRITERS = ("attention.output.weight", "ffn.down.weight", "ffn.shared.down.weight", "ffn.experts.down_EDF")


def weights(config: ModelConfig = MOE, seed: int = 0) -> dict[str, torch.Tensor]:
    decoder = Decoder(config)
    initialise(decoder, seed)
    return dict(decoder.named_parameters())


def assert_deviation(tensor: torch.Tensor, deviation: float, name: str) -> None:
    """Within 5 standard errors of those that a normal sample of this size has."""
    n = tensor.numel()
    assert abs(tensor.mean()) < 5 * deviation / math.sqrt(n), name
    assert tensor.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * n)), name


def test_the_order_of_drawing_and_the_global_generator_do_not_matter() -> None:
    names = {name: tuple(parameter.shape) for name, parameter in weights().items()}
    torch.manual_seed(123)
    backwards = {name: initial_tensor(MOE, name, names[name], 0) for name in reversed(names)}
    for name, parameter in weights().items():
        assert torch.equal(parameter, backwards[name]), name


@pytest.mark.parametrize("scheme", ["normal", "fan_in"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [("w", (40, 12)), ("w", (600, 3)), ("experts.w", (8, 6, 5)), ("norm.weight", (9,)), ("bias_EF", (9, 4))],
)
def test_some_rows_equal_the_rows_of_the_whole(name: str, shape: tuple[int, ...], scheme: str) -> None:
    config = MOE.but(init={"scheme": scheme})
    whole = initial_tensor(config, name, shape, 7)
    assert whole.shape == shape
    across_blocks = slice(250, 520) if shape[0] > 520 else slice(None)
    for rows in (slice(0, 2), slice(3, 8), across_blocks):
        assert torch.equal(initial_tensor(config, name, shape, 7, rows), whole[rows])


def test_every_name_seed_and_expert_has_numbers_of_its_own() -> None:
    same_shape = [initial_tensor(MOE, name, (50, 50), seed) for name, seed in (("a", 0), ("b", 0), ("a", 1))]
    same_shape += list(initial_tensor(MOE, "a", (3, 50, 50), 0))
    flat = torch.stack([tensor.flatten() for tensor in same_shape])
    correlations = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlations.abs().max() < 5 / math.sqrt(2500)


def test_matrices_are_normal_with_the_configs_deviation_and_norms_are_1() -> None:
    for name, parameter in weights().items():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        assert_deviation(parameter, 0.02, name)
        within_1_deviation = (parameter.abs() < 0.02).double().mean().item()
        error = 0.47 / math.sqrt(parameter.numel())
        assert within_1_deviation == pytest.approx(math.erf(1 / math.sqrt(2)), abs=5 * error), name


@pytest.mark.parametrize("scheme", ["megatron", "depth"])
def test_what_writes_to_the_residual_stream_is_scaled_with_the_depth(scheme: str) -> None:
    written = set()
    for name, parameter in weights(MOE.but(init={"scheme": scheme, "std": 0.1})).items():
        if parameter.ndim == 1:
            continue
        _, layer, part = (name + "..").split(".", 2)
        part = part.rstrip(".")
        if part not in WRITERS:
            assert_deviation(parameter, 0.1, name)
            continue
        written.add(part)
        assert_deviation(parameter, 0.1 / math.sqrt(2 * (3 if scheme == "megatron" else int(layer) + 1)), name)
    assert written == set(WRITERS)


def test_fan_in_is_a_normal_truncated_at_2_deviations() -> None:
    # A unit normal cut at +-2 has variance 1 - 2 * 2 phi(2) / erf(sqrt 2).
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    shrunk = math.sqrt(1 - 4 * density / math.erf(math.sqrt(2)))
    for name, parameter in weights(MOE.but(init={"scheme": "fan_in", "std": 0.5})).items():
        if parameter.ndim > 1:
            deviation = 0.5 / math.sqrt(parameter.shape[-1])
            assert parameter.abs().max() <= 2 * deviation, name
            assert_deviation(parameter, shrunk * deviation, name)


def test_with_a_unit_offset_norms_start_at_0_and_biases_always() -> None:
    offset = MOE.but(norm={"unit_offset": True})
    assert not initial_tensor(offset, "blocks.0.attention_norm.weight", (8,), 0).any()
    assert initial_tensor(offset, "blocks.0.attention.query_norm.weight", (8,), 0).all()
    for config in (MOE, offset):
        for name, shape in (
            ("norm.bias", (8,)),
            ("blocks.0.ffn.adapter.b.weight", (8, 2)),
            ("head.bias", (8,)),
            ("blocks.0.ffn.experts.down_bias_ED", (2, 8)),
        ):
            assert not initial_tensor(config, name, shape, 0).any()


@pytest.mark.parametrize("scheme", ["normal", "megatron"])
def test_a_depthwise_convolution_goes_by_its_taps(scheme: str) -> None:
    config = MOE.but(init={"scheme": scheme})
    assert_deviation(initial_tensor(config, "blocks.0.ffn.conv.weight", (2000, 4), 0), 0.5, scheme)


def test_tied_weights_are_one() -> None:
    decoder = Decoder(MOE)
    initialise(decoder, 0)
    assert decoder.head.weight is decoder.embedding.weight
