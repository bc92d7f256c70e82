"""Weighted sums of rewards, by hand."""

import numpy as np
import pytest

from moray import UserError
from moray.jobs.alignment.rewards import Sample, parse_rewards
from moray.jobs.alignment.scores import combine

REWARDS = parse_rewards("exact=1,my:length=-0.5,model:runs/r=2")
SAMPLES = [Sample(f"k{i}", "Q", f"answer {i}", "A", ended=True, tokens=(i,)) for i in range(3)]
VALUES = {
    "model:runs/r": np.array([0.25, -1, 3], np.float32),
    "exact": np.array([1.0, 0, 1]),
    "my:length": np.array([4, 2, 0]),
}


def test_values_totals_and_means() -> None:
    scores = combine(REWARDS, SAMPLES, VALUES)
    assert scores.values_SR.tolist() == [[1, 4, 0.25], [0, 2, -1], [1, 0, 3]]
    assert scores.totals_S.tolist() == [-0.5, -3, 7]
    assert scores.totals_S.dtype == scores.values_SR.dtype == np.float64
    assert scores.means == {"exact": 2 / 3, "my:length": 2, "model:runs/r": 0.75}


def test_a_total_has_the_same_bits_whatever_is_beside_it() -> None:
    generator = np.random.default_rng(0)
    values = {reward.name: generator.normal(size=64) for reward in REWARDS}
    samples = [SAMPLES[0]] * 64
    whole = combine(REWARDS, samples, values).totals_S
    for n in (1, 3, 16):
        parts = [{name: x[at : at + n] for name, x in values.items()} for at in range(0, 64, n)]
        found = [combine(REWARDS, samples[: len(part["exact"])], part).totals_S for part in parts]
        assert np.concatenate(found).tobytes() == whole.tobytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_model_that_is_not_finite_is_named(value: float) -> None:
    values = {**VALUES, "model:runs/r": np.array([0, value, 0])}
    with pytest.raises(UserError, match=rf"model:runs/r on sample k1 \(its answer: 'answer 1'\): is {value}"):
        combine(REWARDS, SAMPLES, values)
