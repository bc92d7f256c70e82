"""The order must be a bijection for every size, and must never change: runs are resumed across versions."""

import numpy as np
import pytest

from moray.data.order import Order, _mix, permute, sequence_counts


def test_mix_is_splitmix64() -> None:
    # The published sequence for seed 1234567; the generator's state grows by the golden gamma between outputs.
    states = [(1234567 + n * 0x9E3779B97F4A7C15) % 2**64 for n in range(5)]
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert _mix(np.array(states, np.uint64)).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 65, 1000, 4097])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_reaches_every_order_of_three() -> None:
    orders = {tuple(permute(np.arange(3), 3, key).tolist()) for key in range(200)}
    assert len(orders) == 6


def test_permute_places_every_index_everywhere_about_equally_often() -> None:
    size, keys = 12, 6000
    images = np.stack([permute(np.arange(size), size, key) for key in range(keys)])
    counts = np.stack([np.bincount(images[:, index], minlength=size) for index in range(size)])
    expected = keys / size
    # Chi-squared of a doubly stochastic table: (12 - 1)^2 = 121 degrees of freedom; 5 standard deviations are allowed.
    assert ((counts - expected) ** 2 / expected).sum() < 121 + 5 * (2 * 121) ** 0.5


def test_permute_needs_no_memory_of_the_domain() -> None:
    size = 10**15
    images = permute(np.arange(1000), size, 7)
    assert len(set(images.tolist())) == 1000
    assert images.min() >= 0
    assert images.max() < size
    assert abs(images.mean() / size - 0.5) < 0.05


@pytest.mark.parametrize(
    ("tokens", "seq_len", "expected"), [(2, 4, 1), (5, 4, 1), (6, 4, 2), (9, 4, 2), (10, 4, 3), (2, 1, 1), (3, 1, 2)]
)
def test_sequence_counts_cover_every_target(tokens: int, seq_len: int, expected: int) -> None:
    assert sequence_counts([tokens], seq_len).tolist() == [expected]


@pytest.mark.parametrize("counts", [[1], [3], [1, 1], [2, 5, 1, 9, 4], [7] * 13, [100, 1, 50]])
def test_an_epoch_visits_every_sequence_once(counts: list[int]) -> None:
    total = sum(counts)
    places = Order(np.array(counts), seed=5).locate(np.arange(total * 3))
    everything = sorted((shard, j) for shard, n in enumerate(counts) for j in range(n))
    for epoch in range(3):
        here = slice(epoch * total, (epoch + 1) * total)
        assert places.epochs[here].tolist() == [epoch] * total
        visited = zip(places.shards[here].tolist(), places.sequences[here].tolist(), strict=True)
        assert sorted(visited) == everything


def test_epochs_and_seeds_differ() -> None:
    counts = np.array([40, 40, 40])
    orders = [Order(counts, seed).locate(np.arange(120) + 120 * epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(zip(o.shards.tolist(), o.sequences.tolist(), strict=True)) for o in orders}) == 4


def test_only_the_shards_of_one_window_are_mixed() -> None:
    places = Order(np.array([10] * 7), seed=3, window_shards=2).locate(np.arange(70))
    shards = places.shards.reshape(-1)
    windows = [set(shards[start : start + 20].tolist()) for start in (0, 20, 40, 60)]
    assert [len(window) for window in windows] == [2, 2, 2, 1]
    assert set().union(*windows) == set(range(7))
    assert len(set(shards[:10].tolist())) == 2


def test_a_position_does_not_depend_on_its_company() -> None:
    counts = np.array([5, 9, 2, 8, 3, 3])
    together = Order(counts, seed=11).locate(np.arange(90))
    for position in (0, 1, 29, 30, 44, 89):
        alone = Order(counts, seed=11).locate(np.array([position]))
        assert alone.shards[0] == together.shards[position]
        assert alone.sequences[0] == together.sequences[position]


def test_the_order_is_pinned() -> None:
    # Not a truth but a promise: these values were written once and must never change, or no run could be resumed.
    places = Order(np.array([3, 2, 4, 1, 2]), seed=42).locate(np.arange(12))
    assert places.shards.tolist() == [0, 2, 1, 4, 2, 0, 2, 4, 2, 0, 1, 3]
    assert places.sequences.tolist() == [2, 0, 1, 0, 3, 1, 2, 1, 1, 0, 0, 0]
