"""Metrics and their standard errors against numbers by hand, and against what repeated draws scatter by."""

import math

import numpy as np
import pytest

from moray.jobs.evaluation.metrics import perplexity, proportion, ratio


def test_a_proportion_by_hand() -> None:
    assert proportion([True, False, True, True]) == (0.75, math.sqrt(0.75 * 0.25 / 4))
    assert proportion([True]) == (1.0, 0.0)


def test_a_ratio_by_hand() -> None:
    """12 bits over 6 bytes is 2 a byte; the items are off by 6 - 2 * 2 = 2, and 6 - 2 * 4 = -2."""
    value, error = ratio([6, 6], [2, 4])
    assert value == 2
    assert error == pytest.approx(math.sqrt(2 / 1 * (4 + 4)) / 6)
    assert ratio([6], [3]) == (2, None)


def test_perplexity_by_hand() -> None:
    value, error = perplexity([-math.log(2), -math.log(8)])
    assert value == pytest.approx(4)  # the geometric mean
    assert error == pytest.approx(4 * math.sqrt(2 * math.log(2) ** 2 / 2))
    assert perplexity([-math.log(3)]) == (pytest.approx(3), None)
    assert math.isfinite(perplexity([-2000.0, -2000.0]).value)


def test_standard_errors_are_what_repeated_draws_scatter_by() -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(10, 100, (2000, 50)).astype(float)
    bits = sizes * random.normal(2, 0.5, sizes.shape)
    found = [ratio(list(a), list(b)) for a, b in zip(bits, sizes, strict=True)]
    told = np.mean([each.standard_error for each in found])
    assert told == pytest.approx(np.std([each.value for each in found]), rel=0.05)
    words = random.normal(-2, 1, (2000, 50))
    perplexities = [perplexity(list(row)) for row in words]
    told = np.mean([each.standard_error for each in perplexities])
    assert told == pytest.approx(np.std([each.value for each in perplexities]), rel=0.05)
