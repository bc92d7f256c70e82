"""Initial weights depend on (seed, name) alone: not on order, not on who draws which part."""

import math

import pytest
import torch

from model import Decoder, ModelConfig, initialise
from model.init import initial_tensor

MOE = ModelConfig.preset("demo-moe", n_layers=2, d_model=32, d_ff=48, n_experts=8, d_expert=16, vocab_size=64)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    decoder = Decoder(MOE)
    initialise(decoder, MOE.init_std, seed)
    return dict(decoder.named_parameters())


def test_the_order_of_drawing_and_the_global_generator_do_not_matter() -> None:
    names = {name: tuple(parameter.shape) for name, parameter in weights().items()}
    torch.manual_seed(123)
    backwards = {name: initial_tensor(name, names[name], MOE.init_std, 0) for name in reversed(names)}
    for name, parameter in weights().items():
        assert torch.equal(parameter, backwards[name]), name


@pytest.mark.parametrize("shape", [(40, 12), (8, 6, 5), (9,)])
def test_some_rows_equal_the_rows_of_the_whole(shape: tuple[int, ...]) -> None:
    whole = initial_tensor("w", shape, 0.02, 7)
    for rows in (slice(0, 2), slice(3, 8), slice(None)):
        assert torch.equal(initial_tensor("w", shape, 0.02, 7, rows), whole[rows])


def test_every_name_seed_and_expert_has_numbers_of_its_own() -> None:
    same_shape = [initial_tensor(name, (50, 50), 1.0, seed) for name, seed in (("a", 0), ("b", 0), ("a", 1))]
    same_shape += list(initial_tensor("a", (3, 50, 50), 1.0, 0))
    flat = torch.stack([tensor.flatten() for tensor in same_shape])
    correlations = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlations.abs().max() < 5 / math.sqrt(2500)


def test_matrices_are_normal_with_the_configs_deviation_and_norms_are_1() -> None:
    for name, parameter in weights().items():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        n = parameter.numel()
        assert abs(parameter.mean()) < 5 * 0.02 / math.sqrt(n), name
        assert parameter.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * n)), name
        within_1_deviation = (parameter.abs() < 0.02).double().mean().item()
        assert within_1_deviation == pytest.approx(math.erf(1 / math.sqrt(2)), abs=5 * 0.47 / math.sqrt(n)), name


def test_tied_weights_are_one() -> None:
    decoder = Decoder(MOE)
    initialise(decoder, 0.02, 0)
    assert decoder.head.weight is decoder.embedding.weight
