"""Numbers over items, each with its standard error: how far it would scatter over other items of the same kind."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Metric(NamedTuple):
    """standard_error: None where one item alone says nothing of it."""

    value: float
    standard_error: float | None


def proportion(flags: Sequence[bool]) -> Metric:
    """The share that is true; standard error sqrt(p (1 - p) / n)."""
    p = sum(flags) / len(flags)
    return Metric(p, math.sqrt(p * (1 - p) / len(flags)))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Metric:
    """R = sum of numerators / sum of denominators, so that long items weigh more.

    Standard error by the delta method: sqrt(n / (n - 1) * sum (a - R b)^2) / sum b (Cochran, Sampling Techniques, 6.4,
    of items drawn from endlessly many).
    """
    n, whole = len(numerators), math.fsum(denominators)
    value = math.fsum(numerators) / whole
    if n == 1:
        return Metric(value, None)
    squares = math.fsum((a - value * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    return Metric(value, math.sqrt(n / (n - 1) * squares) / whole)


def perplexity(log_likelihoods: Sequence[float]) -> Metric:
    """exp of minus their mean; standard error by the delta method: that times the mean's own. At most e^700."""
    n, mean = len(log_likelihoods), math.fsum(log_likelihoods) / len(log_likelihoods)
    value = math.exp(min(-mean, 700))
    if n == 1:
        return Metric(value, None)
    variance = math.fsum((x - mean) ** 2 for x in log_likelihoods) / (n - 1)
    return Metric(value, value * math.sqrt(variance / n))
