"""The critic's loss by loops over floats."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moray.model.alignment.policy import aggregation
from moray.model.alignment.value import Value, ValueBatch
from moray.model.attention.documents import Documents

DRAW = torch.Generator().manual_seed(0)
LENGTHS = [5, 1, 3]
ANSWERS_BT = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
VALUES_BT, OLD_BT, RETURNS_BT = 2 * torch.randn(3, 3, 5, generator=DRAW, dtype=torch.float64) * ANSWERS_BT


def batch() -> ValueBatch:
    weight_S, count = aggregation("dapo", torch.tensor(LENGTHS), torch.tensor([True] * 3), 5)
    none_BT = torch.zeros(3, 5, dtype=torch.int64)
    return ValueBatch(
        none_BT,
        torch.where(ANSWERS_BT, 1, -100),
        none_BT,
        Documents(None, ANSWERS_BT),
        sum(LENGTHS),
        old_values_BT=OLD_BT,
        returns_BT=RETURNS_BT,
        weights_BT=weight_S[:, None] * ANSWERS_BT,
        n_own_count=count,
    )


@pytest.mark.parametrize("clip", [0.2, 1.0, math.inf])
def test_loss_and_gradient_are_those_by_hand(clip: float) -> None:
    own_BT, objective = VALUES_BT.clone().requires_grad_(), Value(clip)
    critic: Any = SimpleNamespace(values=lambda *_: own_BT)
    sums = objective.sums(critic, batch())
    assert not any(metric.requires_grad for metric in sums[1:])
    values = [total / count for total, count in zip(sums, objective.counts(batch()), strict=True)]
    (gradient_BT,) = torch.autograd.grad(values[0], own_BT)
    losses, gradients, clipped = [], [], 0
    answers = [x_BT[ANSWERS_BT].tolist() for x_BT in (VALUES_BT, OLD_BT, RETURNS_BT)]
    for value, old, wanted in zip(*answers, strict=True):
        kept = min(max(value, old - clip), old + clip)
        plain, bounded = (value - wanted) ** 2, (kept - wanted) ** 2
        losses.append(0.5 * max(plain, bounded))
        clipped += bounded > plain
        gradients.append(0.0 if bounded > plain else (value - wanted) / sum(LENGTHS))
    assert gradient_BT[ANSWERS_BT].tolist() == pytest.approx(gradients, rel=1e-12)
    assert gradient_BT[~ANSWERS_BT].abs().max() == 0
    expected = [sum(losses), clipped, sum(answers[0]), sum(answers[2])]
    assert [value.item() for value in values] == pytest.approx([x / sum(LENGTHS) for x in expected], rel=1e-12)
    assert (clipped > 0) == (clip < math.inf)
