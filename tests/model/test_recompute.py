"""What is computed again is what it was, is counted once, and takes the memory that it is said to."""

import ctypes
import subprocess
import sys
from typing import Any

import allocated
import pytest
import torch
from allocated import BATCH, LARGE, TOKENS
from architectures import MODELS, PIECES
from torch import Tensor

from moray.model import Decoder, ModelConfig
from moray.model.accounting.saved import activation_bytes
from moray.model.init import initialise
from moray.model.moe.layer import MoE, Router
from moray.model.randomness import Randomness
from moray.model.recompute import Recompute, cheap, recomputing

HOW: tuple[Recompute, ...] = ("selective", "full")
CONFIGS = MODELS | {name: config for name, (config, _) in PIECES.items()}
ROWS, WIDTH = 4, 12


def batch(config: ModelConfig, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (ROWS, WIDTH), generator=generator)
    documents = torch.arange(WIDTH).expand(ROWS, WIDTH) // 7
    return tokens, tokens.roll(-1, 1), torch.arange(WIDTH).expand(ROWS, WIDTH) % 7, documents


def trained_on_two(config: ModelConfig, how: Recompute, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What two micro-batches leave, their gradients added up."""
    decoder = Decoder(config, how)
    initialise(decoder, seed=1)
    decoder.to(dtype)
    for module in decoder.modules():
        if isinstance(module, Router) and dtype == torch.bfloat16:
            module.float()
    losses = []
    for seed in range(2):
        randomness = Randomness(0, seed, torch.arange(ROWS))
        found = decoder.loss(*batch(config, seed), randomness=randomness)
        (found.cross_entropy + found.auxiliary).backward()
        losses.append([x.item() for x in found])
    layers = [module for module in decoder.modules() if isinstance(module, MoE)]
    return {
        "losses": losses,
        "gradients": {name: weight.grad for name, weight in decoder.named_parameters()},
        "tokens": [layer.tokens_E.tolist() for layer in layers],
        "dropped": [layer.dropped.item() for layer in layers],
    }


def check(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 0) -> None:
    """Within so much of each gradient's largest element; losses and counts are to be the same."""
    gradients, others = expected.pop("gradients"), found.pop("gradients")
    assert found == expected
    for name, gradient in gradients.items():
        if gradient is None:
            assert others[name] is None
        else:
            assert (gradient - others[name]).abs().max() <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize("name", CONFIGS)
def test_full_keeps_every_bit(name: str) -> None:
    check(trained_on_two(CONFIGS[name], "full"), trained_on_two(CONFIGS[name], "none"))


@pytest.mark.parametrize("name", CONFIGS)
def test_selective_differs_by_the_order_of_sums_alone(name: str) -> None:
    expected = trained_on_two(CONFIGS[name], "none", torch.float64)
    check(trained_on_two(CONFIGS[name], "selective", torch.float64), expected, 1e-13)


@pytest.mark.parametrize(("how", "tolerance"), [("selective", 0.02), ("full", 0)])
@pytest.mark.parametrize("name", ["moe-deepseek", "moe-softmax"])
def test_in_bf16_too(name: str, how: Recompute, tolerance: float) -> None:
    expected = trained_on_two(CONFIGS[name], "none", torch.bfloat16)
    check(trained_on_two(CONFIGS[name], how, torch.bfloat16), expected, tolerance)


def test_full_or_capacities_are_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second choice, which rounding may turn, would take other experts; here it always would."""
    config = MODELS["moe-softmax"].but(moe={"capacity_factor": 1.0})
    expected = trained_on_two(config, "none")
    assert sum(expected["dropped"]) > 0
    real, calls = Tensor.topk, []

    def topk(x: Tensor, *rest: Any, **named: Any) -> Any:
        calls.append(len(calls))
        return real(x, *rest, **named)

    monkeypatch.setattr(Tensor, "topk", topk)
    check(trained_on_two(config, "full"), expected)
    assert len(calls) == 2 * config.n_moe_layers


def test_a_cheap_tensor_is_made_once_for_all_its_readers() -> None:
    made = []

    def double(x: Tensor) -> Tensor:
        made.append(torch.is_grad_enabled())
        return 2 * x.exp()

    def layer(x: Tensor) -> Tensor:
        y = cheap(double, x)
        return (y * y).sum() + (y.t() ** 3).sum() + cheap(double, y).sum()

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    recomputing("selective", layer, x).backward()
    assert made == [False, False, True, True]
    again = x.detach().requires_grad_()
    layer(again).backward()
    assert torch.equal(x.grad, again.grad)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc alone tells what is allocated")
@pytest.mark.parametrize("how", ["none", *HOW])
@pytest.mark.parametrize("name", LARGE)
def test_what_is_kept_is_what_is_allocated(name: str, how: Recompute) -> None:
    """In a process of its own, as what other tests have left may be freed at any time."""
    done = subprocess.run([sys.executable, allocated.__file__, name, how], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    predicted = activation_bytes(LARGE[name], TOKENS, how)
    assert int(done.stdout) == pytest.approx(BATCH * (sum(predicted.layers) + predicted.outside), rel=0.05)


@pytest.mark.parametrize("name", LARGE)
def test_less_is_kept_the_more_is_computed_again(name: str) -> None:
    none, selective, full = (sum(activation_bytes(LARGE[name], TOKENS, how).layers) for how in ("none", *HOW))
    assert full < 0.25 * none
    assert full < selective < 0.8 * none
