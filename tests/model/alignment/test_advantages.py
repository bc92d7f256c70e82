"""Advantages against Python's statistics and loops over lists of floats."""

import statistics

import pytest
import torch
from torch import Tensor

from moray import UserError
from moray.model.alignment.advantages import Deviation, gae, group_advantages, token_rewards, whiten

DRAW = torch.Generator().manual_seed(0)
# Lengths 5, 1, 3, and a sample with a tool's tokens in its middle.
MASK_ST = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0]]).bool()
REWARDS_ST, VALUES_ST, LOGP_ST, REFERENCE_ST = torch.randn(4, *MASK_ST.shape, generator=DRAW, dtype=torch.float64)


def of_answers(x_ST: Tensor) -> list[list[float]]:
    """Each sample's numbers without what is masked."""
    return [x_T[mask_T].tolist() for x_T, mask_T in zip(x_ST, MASK_ST, strict=True)]


@pytest.mark.parametrize(
    ("deviation", "epsilon", "by_hand"),
    [("sample", 1e-4, statistics.stdev), ("sample", 1e-6, statistics.stdev), ("population", 1e-4, statistics.pstdev)],
    ids=["TRL", "verl", "MiniMind"],
)
def test_an_answer_is_compared_within_its_group(deviation: Deviation, epsilon: float, by_hand: object) -> None:
    """R1-V 67, TRL 5030: rewards were grouped across prompts; here, prompts of very different rewards."""
    groups = [[1.0, 0.0, 0.5], [101.0, 100.0, 100.0], [-3.0, 2.0, 2.5]]
    found = group_advantages(torch.tensor(groups, dtype=torch.float64), deviation, epsilon)
    expected = [
        [(reward - statistics.fmean(group)) / (by_hand(group) + epsilon) for reward in group]  # type: ignore[operator]
        for group in groups
    ]
    torch.testing.assert_close(found.advantages_PG, torch.tensor(expected).double(), rtol=1e-6, atol=0)
    assert found.advantages_PG.tolist() == [pytest.approx(row, rel=1e-12) for row in expected]
    assert found.n_dead == 0


def test_without_a_deviation_the_mean_alone_is_subtracted() -> None:
    found = group_advantages(torch.tensor([[1.0, 0.0, 0.5], [9.0, 3.0, 3.0]]), None)
    assert found.advantages_PG.tolist() == [[0.5, -0.5, 0.0], [4.0, -2.0, -2.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("deviation", ["sample", "population", None])
def test_a_dead_group_has_advantage_0(deviation: Deviation | None, dtype: torch.dtype) -> None:
    """In fp64, three times 0.1 have another mean than 0.1, which would be divided by the deviation alone."""
    rewards_PG = torch.tensor([[0.1, 0.1, 0.1], [1.0, 0.0, 0.0], [0.7, 0.7, 0.7]], dtype=dtype)
    assert dtype == torch.float32 or (rewards_PG[0].mean() != rewards_PG[0, 0])
    found = group_advantages(rewards_PG, deviation, epsilon=1e-30)
    assert found.n_dead == 2
    assert found.advantages_PG[[0, 2]].abs().max() == 0
    assert found.advantages_PG[1].abs().min() > 0.3


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"group_size=1: .* at least 2"):
        group_advantages(torch.ones(3, 1))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_refused(wrong: float) -> None:
    """TRL drops it from its sum, ms-swift 8123."""
    rewards_S = torch.tensor([0.0, 1.0, 1.0, wrong])
    with pytest.raises(UserError, match=f"reward of sample 3 is {wrong}"):
        group_advantages(rewards_S.view(2, 2))
    with pytest.raises(UserError, match=f"reward of sample 3 is {wrong}"):
        token_rewards(rewards_S, LOGP_ST, REFERENCE_ST, MASK_ST, 0.1)


def test_the_score_is_at_the_last_token_of_the_answer() -> None:
    """TRL 3750 had it on the padding. What is masked may be anything: it has no reward."""
    scores_S = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    noise_ST = LOGP_ST.masked_fill(~MASK_ST, torch.nan)
    found_ST = token_rewards(scores_S, noise_ST, REFERENCE_ST, MASK_ST, kl_coefficient=0.1)
    for score, logp, reference, row_T, mask_T in zip(
        scores_S.tolist(), of_answers(LOGP_ST), of_answers(REFERENCE_ST), found_ST, MASK_ST, strict=True
    ):
        expected = [-0.1 * (p - q) for p, q in zip(logp, reference, strict=True)]
        expected[-1] += score
        assert row_T[mask_T].tolist() == pytest.approx(expected, rel=1e-14)
        assert row_T[~mask_T].abs().max() == 0


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.8), (0.97, 0.0), (1.0, 1.0)])
def test_estimates_are_sums_of_deltas(discount: float, decay: float) -> None:
    """Schulman et al., 2016, eq. 16, term by term; miles 1827: masked tokens decayed it. One answer is a token long."""
    poison = [x_ST.masked_fill(~MASK_ST, torch.nan) for x_ST in (REWARDS_ST, VALUES_ST)]
    found = gae(*poison, MASK_ST, discount, decay)
    advantages, returns = (of_answers(x_ST) for x_ST in found)
    for s, (rewards, values) in enumerate(zip(of_answers(REWARDS_ST), of_answers(VALUES_ST), strict=True)):
        deltas = [r + discount * after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0], strict=True)]
        expected = [
            sum((discount * decay) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))
        ]
        assert advantages[s] == pytest.approx(expected, rel=1e-12)
        assert returns[s] == pytest.approx([a + v for a, v in zip(expected, values, strict=True)], rel=1e-12)
        if discount == decay == 1:
            assert returns[s] == pytest.approx([sum(rewards[t:]) for t in range(len(rewards))], rel=1e-12)
    assert all(x_ST[~MASK_ST].abs().max() == 0 for x_ST in found)


@pytest.mark.parametrize(
    ("deviation", "variance"), [("sample", statistics.variance), ("population", statistics.pvariance)]
)
def test_whitening_is_over_all_tokens_of_answers(deviation: Deviation, variance: object) -> None:
    """The mean is gone for good: torchtune's adds it again."""
    found_ST = whiten(REWARDS_ST.masked_fill(~MASK_ST, torch.nan), MASK_ST, deviation)
    held = REWARDS_ST[MASK_ST].tolist()
    scale = (variance(held) + 1e-8) ** 0.5  # type: ignore[operator]
    expected = [(x - statistics.fmean(held)) / scale for x in held]
    assert found_ST[MASK_ST].tolist() == pytest.approx(expected, rel=1e-12)
    assert found_ST[~MASK_ST].abs().max() == 0


def test_a_single_token_is_whitened_to_0() -> None:
    """verl divides by 0."""
    one_11 = torch.ones(1, 1)
    assert whiten(3 * one_11, one_11.bool()).tolist() == [[0.0]]
