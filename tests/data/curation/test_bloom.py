"""The filter against a Python set and its closed form."""

import math

import numpy as np
import pytest

from moray import UserError
from moray.data.curation.bloom import Bloom
from moray.data.curation.words import mix


def distinct(start: int, n: int) -> np.ndarray:
    return mix(np.arange(start, start + n, dtype=np.uint64))


def test_what_was_added_is_there() -> None:
    filter, hashes = Bloom.sized(5000, 0.01), distinct(0, 20_000)
    filter.add(hashes)
    assert filter.add(hashes).all()
    assert filter.add(hashes[::-1]).all()


@pytest.mark.parametrize("load", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("rate", [0.2, 0.01])
def test_new_hashes_seem_old_as_often_as_the_formula_says(load: float, rate: float) -> None:
    n, n_asked = round(load * 20_000), 20_000
    filter = Bloom.sized(20_000, rate)
    filter.add(distinct(0, n))
    expected = filter.false_positive_rate(n)
    # Asked one at a time of a copy: adding changes the answer for the next.
    copies = [Bloom(filter.n_bits, filter.n_places) for _ in range(20)]
    found = 0
    for number, copy in enumerate(copies):
        copy.bytes[:] = filter.bytes
        found += int(copy.add(distinct(10**6 + number * n_asked // 20, n_asked // 20)).sum())
    # The copies fill by a twentieth of n at most.
    most = filter.false_positive_rate(n + n_asked // 20)
    deviation = math.sqrt(n_asked * most)
    assert n_asked * expected * 0.9 - 4 * deviation <= found <= n_asked * most * 1.1 + 4 * deviation


def test_distinct_hashes_are_lost_at_the_rate_at_most() -> None:
    n, rate = 100_000, 0.001
    lost = int(Bloom.sized(n, rate).add(distinct(0, n)).sum())
    assert lost < n * rate
    assert Bloom.sized(n, rate).false_positive_rate(n) <= rate


def one_by_one(filter: Bloom, hashes: np.ndarray) -> list[bool]:
    """By Python's own integers and a set of places."""
    known: set[int] = set()
    answers = []
    for value in hashes.tolist():
        start = int(mix(np.array([value], np.uint64))[0])
        step = int(mix(np.array([start], np.uint64))[0]) | 1
        places = {(start + number * step) % filter.n_bits for number in range(filter.n_places)}
        answers.append(places <= known)
        known |= places
    return answers


@pytest.mark.parametrize(("n_bits", "n_places"), [(8, 1), (256, 3), (4096, 4), (1 << 16, 7)])
def test_one_call_answers_as_one_by_one(n_bits: int, n_places: int) -> None:
    chance = np.random.default_rng(0)
    hashes = mix(chance.integers(0, 2000, 3000).astype(np.uint64))  # a third of them come again
    expected = one_by_one(Bloom(n_bits, n_places), hashes)
    whole, parts = Bloom(n_bits, n_places), Bloom(n_bits, n_places)
    assert whole.add(hashes).tolist() == expected
    assert [answer for low in range(0, 3000, 7) for answer in parts.add(hashes[low : low + 7]).tolist()] == expected
    assert (whole.bytes == parts.bytes).all()


def test_chunks_of_a_call_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = mix(np.random.default_rng(0).integers(0, 30_000, 40_000).astype(np.uint64))
    expected = Bloom.sized(5000, 0.1).add(hashes)
    monkeypatch.setattr("moray.data.curation.bloom._CHUNK_BITS", 5)
    assert (Bloom.sized(5000, 0.1).add(hashes) == expected).all()
    assert Bloom.sized(10, 0.1).add(hashes[:0]).tolist() == []


@pytest.mark.parametrize(("n", "rate", "n_bits", "n_places"), [
    (1000, 0.01, 1 << 14, 11), (1_000_000, 0.001, 1 << 24, 12), (0, 0.5, 8, 6)
])  # fmt: skip
def test_size_is_by_the_formula(n: int, rate: float, n_bits: int, n_places: int) -> None:
    filter = Bloom.sized(n, rate)
    assert (filter.n_bits, filter.n_places) == (n_bits, n_places)
    assert filter.bytes.nbytes == n_bits // 8


@pytest.mark.parametrize("rate", [0.0, 1.0, -1.0])
def test_a_rate_must_be_one(rate: float) -> None:
    with pytest.raises(UserError, match=r"rate=.* between 0 and 1"):
        Bloom.sized(10, rate)
