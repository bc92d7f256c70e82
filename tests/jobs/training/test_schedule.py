"""The learning rate against its closed forms."""

import math

import pytest

from moray.jobs.config.sections import OptimizerSection
from moray.jobs.training.schedule import learning_rate


def rates(steps: int, **settings: object) -> list[float]:
    optimizer = OptimizerSection(lr=0.01, min_lr_ratio=0.1, **settings)  # type: ignore[arg-type]
    return [learning_rate(step, steps, optimizer) for step in range(steps)]


def test_warm_up_is_a_line_that_begins_above_0_and_reaches_the_highest_rate() -> None:
    for schedule in ("cosine", "wsd"):
        found = rates(100, warmup_steps=5, schedule=schedule)
        assert found[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])


def test_cosine_falls_from_the_end_of_warm_up_to_the_last_step() -> None:
    found = rates(110, warmup_steps=10, schedule="cosine")
    truth = [0.001 + 0.009 * math.cos(math.pi * done / 200) ** 2 for done in range(101)]  # cos^2(x/2) = (1 + cos x) / 2
    assert found[9:] == pytest.approx(truth)
    assert found[59] == pytest.approx((0.01 + 0.001) / 2)
    without = rates(101, warmup_steps=0, schedule="cosine")
    assert without == pytest.approx(truth), "without warm-up the first step has the highest rate"


def test_wsd_decays_from_its_first_decaying_step() -> None:
    found = rates(100, warmup_steps=10, schedule="wsd", decay_fraction=0.2)
    assert found[9:80] == pytest.approx([0.01] * 71)
    assert found[80:] == pytest.approx([0.01 - 0.009 * done / 20 for done in range(1, 21)])
    assert rates(10, warmup_steps=0, schedule="wsd")[-3:] == pytest.approx([0.01, 0.0055, 0.001])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 30])
@pytest.mark.parametrize("steps", [31, 60])
def test_up_then_down_within_bounds(schedule: str, warmup_steps: int, steps: int) -> None:
    found = rates(steps, warmup_steps=warmup_steps, schedule=schedule)
    assert found[:warmup_steps] == sorted(found[:warmup_steps])
    assert found[warmup_steps:] == sorted(found[warmup_steps:], reverse=True)
    assert max(found) == pytest.approx(0.01)
    assert found[-1] == pytest.approx(0.001), "the last step has lr * min_lr_ratio"
    assert all(0 < rate <= 0.01 * (1 + 1e-12) for rate in found)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_shortest_runs(schedule: str) -> None:
    assert rates(1, warmup_steps=0, schedule=schedule) == pytest.approx([0.01])
    assert rates(1, warmup_steps=1, schedule=schedule) == pytest.approx([0.01])
    assert rates(2, warmup_steps=0, schedule=schedule) == pytest.approx([0.01, 0.001])
    assert rates(3, warmup_steps=3, schedule=schedule) == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])


def test_a_decay_longer_than_what_warm_up_leaves_begins_after_it() -> None:
    found = rates(10, warmup_steps=5, schedule="wsd", decay_fraction=1.0)
    assert found[4:] == pytest.approx([0.01, *[0.01 - 0.009 * done / 5 for done in range(1, 6)]])
    assert rates(10, warmup_steps=0, schedule="wsd", decay_fraction=1.0) == pytest.approx(
        [0.01 - 0.009 * done / 9 for done in range(10)]
    )
