"""AdamW as built here against torch's plain AdamW, and the promise that norms do not decay."""

import copy

import pytest
import torch
from torch import Tensor, nn

from moray.jobs.config.run import OptimizerSection
from moray.jobs.training.optimizer import build_optimizer, set_learning_rate, training_state
from moray.model import Decoder, ModelConfig, initialise

CONFIG = ModelConfig.preset(
    "demo-moe",
    n_layers=2,
    d_model=32,
    vocab_size=64,
    attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
    ffn={"width": 48},
    moe={"expert_width": 16},
    init={"std": 0.1},
)


def decoder() -> Decoder:
    module = Decoder(CONFIG)
    initialise(module, seed=0)
    return module


def give_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_five_steps_equal_torchs_adamw() -> None:
    module = decoder()
    twin = copy.deepcopy(module)
    settings = OptimizerSection(lr=3e-3, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2)
    ours = build_optimizer(module, settings)
    theirs = torch.optim.AdamW(
        [
            {"params": [p for p in twin.parameters() if p.ndim >= 2], "weight_decay": 0.2},
            {"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.9),
        eps=1e-6,
        fused=False,
        foreach=False,
    )
    for step in range(5):
        set_learning_rate(ours, 1e-3 * (step + 1))
        set_learning_rate(theirs, 1e-3 * (step + 1))
        for each, optimizer in ((module, ours), (twin, theirs)):
            give_gradients(each, seed=step)
            optimizer.step()
    for (name, mine), other in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7, msg=name)


def test_only_matrices_decay() -> None:
    """With gradients of zero, Adam moves nothing: what is left is the decay, a factor of 1 - lr * weight_decay."""
    module = decoder()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = build_optimizer(module, OptimizerSection(lr=0.5, weight_decay=0.1))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in module.named_parameters():
        factor = 1.0 if "norm" in name else 0.95
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


def test_the_state_exists_before_the_first_step_and_holds_all_a_commit_needs() -> None:
    module = decoder()
    state = training_state(module, build_optimizer(module, OptimizerSection()))
    names = dict(module.named_parameters())
    for name, parameter in names.items():
        assert state[f"model.{name}"].data_ptr() == parameter.data_ptr(), "not a copy: loading fills it in place"
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[f"optimizer.{name}.{key}"].shape == parameter.shape
        assert state[f"optimizer.{name}.step"] == 0
    assert "model.blocks.1.ffn.router.bias_E" in state
    assert not any("tokens_E" in name for name in state), "counts of a step begun belong to no commit"


def moved(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    give_gradients(module, seed=9)
    optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_a_filled_state_goes_on_where_the_other_stopped() -> None:
    first = decoder()
    first_optimizer = build_optimizer(first, OptimizerSection())
    for step in range(3):
        give_gradients(first, seed=step)
        first_optimizer.step()
    second = decoder()
    second_optimizer = build_optimizer(second, OptimizerSection())
    source = training_state(first, first_optimizer)
    with torch.no_grad():
        for name, tensor in training_state(second, second_optimizer).items():
            tensor.copy_(source[name])
    expected = moved(first, first_optimizer)
    for name, value in moved(second, second_optimizer).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_the_rate_reaches_every_group(rate: float) -> None:
    optimizer = build_optimizer(decoder(), OptimizerSection())
    set_learning_rate(optimizer, rate)
    assert len(optimizer.param_groups) == 2
    assert {group["lr"] for group in optimizer.param_groups} == {rate}


def test_biases_are_not_decayed_stacked_ones_of_experts_neither() -> None:
    biased = CONFIG.but(ffn={"bias": True}, attention={"qkv_bias": True})
    module = Decoder(biased)
    optimizer = build_optimizer(module, OptimizerSection(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in module.named_parameters() if id(parameter) in decayed}
    stacked = {name for name, parameter in module.named_parameters() if "bias" in name and parameter.ndim == 2}
    assert len(stacked) == 3
    assert not [name for name in names if "bias" in name or "norm" in name]
    assert "blocks.1.ffn.experts.down_EDF" in names
