"""Which source each position of the stream is drawn from, and how many it has given before: pure functions of (seed,
position, phases), law 2 for several datasets.

A phase is a stretch of positions with one set of weights, dealt out in cycles of 4,096 positions: a source has its
count of slots in each cycle, and where these lie is a permutation that the seed, the phase and the cycle choose. The
n-th position that falls to a source takes the n-th sequence of that source's own order. So nothing is left out or taken
twice, wherever a phase begins, and what is behind a position never depends on what comes after it: a change of weights
is one more phase.
"""

# Shapes: N positions, S sources, C slots of a cycle.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from moray.data.order import derive_key, permute

CYCLE = 4096
"""Shares are exact at the end of every cycle, and within 1% of one, about, in between; the least is one slot of it."""

_SALT = 0x6D6978  # "mix": keys other than those of epochs


@dataclass(frozen=True)
class Phase:
    """From position `start` on, so many slots of each cycle are a source's: S counts, whose sum is CYCLE."""

    start: int
    counts: tuple[int, ...]


class Mixture:
    """The phases of a stream, by their starts, the first of which is 0.

    Memory: the last few cycles that were asked for, 32 KiB a source each.
    """

    def __init__(self, phases: Sequence[Phase], seed: int) -> None:
        assert phases[0].start == 0
        assert all(sum(phase.counts) == CYCLE for phase in phases)
        self._phases = phases
        self._starts = np.array([phase.start for phase in phases])
        self._given = lru_cache(maxsize=4)(
            lambda phase, cycle: _given(phases[phase].counts, derive_key(seed, _SALT, phases[phase].start, cycle))
        )
        before = [np.zeros(len(phases[0].counts), np.int64)]
        for number, end in enumerate(self._starts[1:].tolist()):
            before.append(before[-1] + self._drawn_in(number, end))
        self._before = before

    def place(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source, and index within that source's own stream, of each position: int64 [N] -> [N] and [N]."""
        phases = np.searchsorted(self._starts, positions, side="right") - 1
        cycles, slots = np.divmod(positions - self._starts[phases], CYCLE)
        sources, indices = np.empty_like(positions), np.empty_like(positions)
        for phase, cycle in sorted(set(zip(phases.tolist(), cycles.tolist(), strict=True))):
            here = (phases == phase) & (cycles == cycle)
            given_CS, slots_N = self._given(phase, cycle), slots[here]
            sources[here] = (given_CS[slots_N + 1] - given_CS[slots_N]).argmax(1)
            base_S = self._before[phase] + cycle * np.array(self._phases[phase].counts)
            indices[here] = (base_S + given_CS[slots_N])[np.arange(len(slots_N)), sources[here]]
        return sources, indices

    def drawn(self, position: int) -> np.ndarray:
        """How many positions before this one fell to each source: int64 [S]."""
        phase = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._before[phase] + self._drawn_in(phase, position)

    def _drawn_in(self, phase: int, end: int) -> np.ndarray:
        cycles, rest = divmod(end - self._phases[phase].start, CYCLE)
        return cycles * np.array(self._phases[phase].counts) + self._given(phase, cycles)[rest]


def _given(counts: tuple[int, ...], key: int) -> np.ndarray:
    """How many slots before each one of a cycle are each source's: int64 [C + 1, S]."""
    sources_C = np.searchsorted(np.cumsum(counts), permute(np.arange(CYCLE), CYCLE, key), side="right")
    is_of_CS = sources_C[:, None] == np.arange(len(counts))
    return np.concatenate([np.zeros((1, len(counts)), np.int64), np.cumsum(is_of_CS, axis=0)])


def counts_of(weights: Mapping[str, Fraction]) -> tuple[int, ...]:
    """The slots of a cycle for weights that add up to anything above 0, by largest remainder; of equal ones the first.

    Exact, so that no machine rounds otherwise. A weight of at least `least_weight` has a slot.
    """
    total = sum(weights.values())
    exact = [weight * CYCLE / total for weight in weights.values()]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: CYCLE - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def least_weight(others: Fraction) -> Fraction:
    """That of one slot of a cycle, beside others that add up to this."""
    return others / (CYCLE - 1)
