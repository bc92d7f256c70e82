"""Jacobs et al., 1991: both losses by hand, and that competition makes specialists where cooperation does not."""

import math
import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moray.model.moe.local_experts import LocalExperts, competitive_loss, cooperative_loss

CASES, TASKS, EXPERTS, INPUTS = 400, 4, 4, 4


def test_the_losses_by_hand() -> None:
    """Two experts that say 0 and 3, believed 3 : 1, of a target 1: blend 0.75, distances 1 and 4."""
    outputs, log_gates = torch.tensor([[[0.0], [3.0]]]), torch.tensor([[0.75, 0.25]]).log()
    target = torch.tensor([[1.0]])
    assert cooperative_loss(outputs, log_gates, target).item() == pytest.approx(0.0625)
    expected = -math.log(0.75 * math.exp(-1 / 2) + 0.25 * math.exp(-4 / 2))
    assert competitive_loss(outputs, log_gates, target).item() == pytest.approx(expected)


def test_competition_teaches_by_the_posterior_and_cooperation_by_the_gate() -> None:
    """The paper's derivatives (eqs. 1.1 and 1.3): -2 p_i (d - blend) and -posterior_i (d - o_i)."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 3, 2, dtype=torch.float64, generator=generator).requires_grad_()
    gates = torch.randn(5, 3, dtype=torch.float64, generator=generator).softmax(-1)
    targets = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    (cooperative,) = torch.autograd.grad(cooperative_loss(outputs, gates.log(), targets).sum(), [outputs])
    blend = torch.einsum("ne,neo->no", gates, outputs)
    torch.testing.assert_close(cooperative, -2 * gates[..., None] * (targets - blend)[:, None])
    (competitive,) = torch.autograd.grad(competitive_loss(outputs, gates.log(), targets).sum(), [outputs])
    likelihood = gates * torch.exp(-0.5 * (targets[:, None] - outputs).square().sum(-1))
    posterior = likelihood / likelihood.sum(-1, keepdim=True)
    torch.testing.assert_close(competitive, -posterior[..., None] * (targets[:, None] - outputs))


def separable_task(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and regions: four sub-problems, in four regions of the input, each with a linear map of its own.

    Some inputs say in which region a case lies, the others are what its map is applied to.
    """
    generator = torch.Generator().manual_seed(seed)
    region = torch.arange(CASES) % TASKS
    x = torch.randn(CASES, INPUTS, generator=generator)
    maps = 3 * torch.randn(TASKS, INPUTS, 2, generator=generator)
    return torch.cat((F.one_hot(region, TASKS), x), 1), torch.einsum("ni,nio->no", x, maps[region]), region


def trained(loss: Callable[[Tensor, Tensor, Tensor], Tensor], seed: int) -> tuple[float, float, float]:
    """After 600 steps: how many experts share a case (the exponential of the gate's mean entropy), the squared error of
    each case's most trusted expert, alone, over the targets' variance, and the share of cases that trust the expert
    which most of their region trusts."""
    x, targets, region = separable_task(seed)
    torch.manual_seed(seed)
    model = LocalExperts(EXPERTS, x.shape[1], 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(600):
        optimizer.zero_grad()
        loss(*model(x), targets).mean().backward()
        optimizer.step()
    with torch.no_grad():
        outputs, log_gates = model(x)
        sharing = -(log_gates.exp() * log_gates).sum(-1).mean()
        most_trusted = log_gates.argmax(-1)
        error = (outputs[torch.arange(CASES), most_trusted] - targets).square().mean() / targets.var()
        table = torch.zeros(TASKS, EXPERTS).index_put((region, most_trusted), torch.ones(()), accumulate=True)
    return sharing.exp().item(), error.item(), table.amax(1).sum().item() / CASES


def test_competition_yields_specialists_and_cooperation_does_not() -> None:
    """Medians over three starts. Competing experts each solve their cases alone; cooperating ones blend on every case,
    and none of them can do it alone."""
    competition, cooperation = (
        [statistics.median(values) for values in zip(*(trained(loss, seed) for seed in range(3)), strict=True)]
        for loss in (competitive_loss, cooperative_loss)
    )
    assert competition[0] < 1.1 < 1.3 < cooperation[0]
    assert competition[1] < 0.01 < 0.2 < cooperation[1]
    assert competition[2] > 0.99
