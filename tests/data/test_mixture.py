"""Where a mixture's positions lie, against a placement written out one position at a time in plain Python."""

import random
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from moray.data.mixture import CYCLE, Mixture, Phase, counts_of, least_weight
from moray.data.order import derive_key, permute

SEED = 7


def phase(start: int, *weights: str) -> Phase:
    return Phase(start, counts_of({str(i): Fraction(weight) for i, weight in enumerate(weights)}))


def one_by_one(phases: list[Phase], seed: int, end: int) -> list[tuple[int, int]]:
    """The definition: a cycle's slots are shuffled, and each source counts what it has given so far."""
    found, given = [], [0] * len(phases[0].counts)
    for now, after in pairwise([*phases, Phase(end, ())]):
        position = now.start
        while position < after.start:
            key = derive_key(seed, 0x6D6978, now.start, (position - now.start) // CYCLE)
            for slot in permute(np.arange(CYCLE), CYCLE, key).tolist():
                if position == after.start:
                    break
                source = 0
                while slot >= now.counts[source]:
                    slot -= now.counts[source]
                    source += 1
                found.append((source, given[source]))
                given[source] += 1
                position += 1
    return found


def place(mixture: Mixture, positions: object) -> list[tuple[int, int]]:
    sources, indices = mixture.place(np.array(positions, np.int64))
    return list(zip(sources.tolist(), indices.tolist(), strict=True))


# Phases that begin at a cycle's end and within one, again before the first cycle of a phase is over, and after a batch.
PHASES = [
    phase(0, "0.6", "0.3", "0.1"),
    phase(2 * CYCLE, "1", "1", "1"),
    phase(2 * CYCLE + 1000, "0", "0.5", "0.5"),
    phase(2 * CYCLE + 1004, "0.1", "0.8", "0.1"),
    phase(5 * CYCLE, "1", "0", "0"),
]
END = 6 * CYCLE + 77


def test_places_are_those_of_the_definition() -> None:
    assert place(Mixture(PHASES, SEED), range(END)) == one_by_one(PHASES, SEED, END)


@pytest.mark.parametrize("number", range(len(PHASES)))
def test_each_source_gives_its_sequences_in_order_once_over_all_phases(number: int) -> None:
    """Whether or not the later phases are known yet."""
    mixture = Mixture(PHASES[: number + 1], SEED)
    sources, indices = mixture.place(np.arange(END))
    for source, drawn in enumerate(mixture.drawn(END).tolist()):
        assert indices[sources == source].tolist() == list(range(drawn))


def test_a_later_phase_changes_nothing_before_it() -> None:
    for before, after in ((PHASES[:n], PHASES[: n + 1]) for n in range(1, len(PHASES))):
        positions = np.arange(after[-1].start)
        assert place(Mixture(before, SEED), positions) == place(Mixture(after, SEED), positions)


def test_random_access_in_any_order_is_the_same() -> None:
    whole = place(Mixture(PHASES, SEED), range(END))
    draw = random.Random(0)
    for size in (1, 3, 64, 5000):
        positions = [draw.randrange(END) for _ in range(size)]
        assert place(Mixture(PHASES, SEED), positions) == [whole[position] for position in positions]


def test_shares_are_exact_at_every_cycles_end_and_near_in_between() -> None:
    weights = ("0.6", "0.35", "0.05")
    mixture = Mixture([phase(0, *weights)], SEED)
    counts = np.array(counts_of({name: Fraction(name) for name in weights}))
    for cycle in range(5):
        assert mixture.drawn(cycle * CYCLE).tolist() == (cycle * counts).tolist()
    sources, _ = mixture.place(np.arange(3 * CYCLE))
    drawn = np.cumsum(sources[:, None] == np.arange(3), axis=0)
    drift = np.abs(drawn - np.arange(1, len(drawn) + 1)[:, None] * counts / CYCLE)
    # Of a shuffled cycle: a Brownian bridge, whose deviation half-way is sqrt(C w (1 - w)) / 2; four of them.
    assert (drift.max(0) < 4 * np.sqrt(CYCLE * counts / CYCLE * (1 - counts / CYCLE)) / 2).all()


def test_a_source_without_weight_changes_nothing_for_the_others() -> None:
    """So that it may come later, under whatever name."""
    for at in range(4):
        more = [Phase(one.start, (*one.counts[:at], 0, *one.counts[at:])) for one in PHASES]
        moved = [(source + (source >= at), index) for source, index in place(Mixture(PHASES, SEED), range(END))]
        assert place(Mixture(more, SEED), range(END)) == moved


def test_a_lone_source_is_every_position_itself() -> None:
    assert place(Mixture([phase(0, "1")], SEED), range(2 * CYCLE + 5)) == [(0, n) for n in range(2 * CYCLE + 5)]


def test_another_seed_and_another_cycle_deal_otherwise() -> None:
    sources = [Mixture([phase(0, "1", "1")], seed).place(np.arange(2 * CYCLE))[0] for seed in (0, 1)]
    assert (sources[0] != sources[1]).any()
    assert (sources[0][:CYCLE] != sources[0][CYCLE:]).any()


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        (("1",), (4096,)),
        (("0.6", "0.4"), (2458, 1638)),  # 2457.6 and 1638.4
        (("1", "1", "1"), (1366, 1365, 1365)),  # equal remainders: the first one's
        (("6", "4"), (2458, 1638)),
        (("4095", "1"), (4095, 1)),
        (("3", "0", "1"), (3072, 0, 1024)),
    ],
)
def test_counts_by_hand(weights: tuple[str, ...], counts: tuple[int, ...]) -> None:
    assert counts_of({str(i): Fraction(weight) for i, weight in enumerate(weights)}) == counts


def test_the_least_weight_has_a_slot() -> None:
    others = {"a": Fraction("0.7"), "b": Fraction("0.3")}
    assert counts_of(others | {"c": least_weight(Fraction(1))})[2] == 1
    assert least_weight(Fraction(4095)) == 1
