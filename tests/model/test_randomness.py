"""Random numbers as a function of their key: known answers, distribution, and that every part of the key matters."""

import math

import pytest
import torch
from torch import Tensor

from moray.model.randomness import Randomness, _next, gumbel, normal, normal_quantile, uniform

POSITIONS = torch.arange(64).expand(40, 64)


def keys(seed: int = 0, step: int = 0, first: int = 0, name: str = "router 0") -> Tensor:
    return Randomness(seed, step, torch.arange(first, first + 40)).keys(name, POSITIONS)


def test_mixing_is_splitmix64() -> None:
    """Against the published generator's recurrence in Python's unbounded integers."""
    mask = 2**64 - 1
    states = [0, 1, 1234567, 2**63, mask]
    expected = []
    for state in states:
        z = (state + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        expected.append(z ^ (z >> 31))
    signed = torch.tensor([state - 2**64 * (state >= 2**63) for state in states])
    assert [x & mask for x in _next(signed).tolist()] == expected
    # The first output of the reference implementation for seed 1234567.
    assert expected[2] == 6457827717110365317


def test_uniform_numbers_fill_their_interval_evenly() -> None:
    """Chi-square over 100 cells has mean 99 and deviation 14; moments of 128,000 numbers within 4 deviations."""
    u = uniform(keys(), "noise", 50).flatten()
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    cells = torch.bincount((u * 100).long(), minlength=100).double()
    chi_square = ((cells - len(u) / 100) ** 2 / (len(u) / 100)).sum()
    assert 99 - 4 * 14 < chi_square < 99 + 4 * 14
    assert u.mean().item() == pytest.approx(1 / 2, abs=4 / math.sqrt(12 * len(u)))
    assert u.var().item() == pytest.approx(1 / 12, abs=4 / math.sqrt(180 * len(u)))


def test_every_bit_is_fair() -> None:
    u = uniform(keys(), "noise", 50).flatten()
    for bit in range(1, 33):
        ones = ((u * 2**bit).floor() % 2).mean().item()
        assert ones == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(len(u))), bit


def test_normal_numbers_have_the_moments_of_a_normal() -> None:
    z = normal(keys(), "noise", 50).flatten()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert (z**power).mean().item() == pytest.approx(moment, abs=4 * math.sqrt(variance / len(z)))


def test_the_normal_quantile() -> None:
    p = torch.cat((torch.linspace(1e-9, 1 - 1e-9, 10_001, dtype=torch.float64), 2.0 ** -torch.arange(1.0, 53)))
    torch.testing.assert_close(normal_quantile(p), torch.special.ndtri(p), rtol=2e-9, atol=1e-9)


@pytest.mark.parametrize(
    "other",
    [keys(seed=1), keys(step=1), keys(first=40), keys(name="router 1")],
    ids=["seed", "step", "sequence", "layer"],
)
def test_every_part_of_the_key_draws_numbers_of_its_own(other: Tensor) -> None:
    a, b = uniform(keys(), "noise", 50), uniform(other, "noise", 50)
    correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(a.numel())
    assert not (a == b).any()


def test_neighbours_are_independent() -> None:
    """Along sequences, positions and channels, and of another name for the same token."""
    u = uniform(keys(), "noise", 50)
    pairs = [(u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[..., 1:], u[..., :-1]), (u, uniform(keys(), "jitter", 50))]
    for a, b in pairs:
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 4 / math.sqrt(a.numel())


def test_any_part_of_a_batch_draws_what_the_whole_draws() -> None:
    """Rows in another order, a slice of the positions, fewer channels: the same numbers at the same place."""
    whole = normal(keys(), "noise", 16)
    rows = torch.tensor([7, 3])
    part = Randomness(0, 0, rows).keys("router 0", POSITIONS[:2, 20:30])
    assert torch.equal(normal(part, "noise", 5), whole[rows, 20:30, :5])


def test_a_part_of_the_channels_draws_what_the_whole_draws() -> None:
    whole = uniform(keys(), "token", 16)
    assert torch.equal(uniform(keys(), "token", 5, first=9), whole[..., 9:14])


def test_gumbel_numbers_have_the_moments_of_a_gumbel() -> None:
    """Euler's constant, and pi^2 / 6: within four deviations of so many numbers."""
    numbers = gumbel(keys(), "token", 50)
    n = numbers.numel()
    assert numbers.mean().item() == pytest.approx(0.5772156649, abs=4 * math.sqrt(math.pi**2 / 6 / n))
    assert numbers.var().item() == pytest.approx(math.pi**2 / 6, rel=4 * math.sqrt(4.4 / n))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_bits() -> None:
    on_gpu = Randomness(0, 0, torch.arange(40, device="cuda")).keys("router 0", POSITIONS.cuda())
    assert torch.equal(normal(on_gpu, "noise", 50).cpu(), normal(keys(), "noise", 50))
