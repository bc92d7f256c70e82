"""Why a generation ended, what every rank was doing then, and what follows from the faults of a run so far."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moray.cluster.ray.messages import WorkerState

HOUR_S = 3600.0
MOST_GROUPS = 16


@dataclass(frozen=True)
class Fault:
    """The failure that ended a generation: the first one, not what its peers made of it."""

    reason: str
    rank: int | None = None
    pid: int | None = None
    node: str | None = None
    traceback: str | None = None
    is_users_mistake: bool = False
    step: int | None = None
    """The last one that the rank did; None before the first, or where the fault is no rank's."""
    node_id: str | None = None
    """Of `node`, as Ray has it."""
    suspects: tuple[int, ...] = ()
    """Ranks that computed wrongly, or one of which did; the first is `rank`."""
    ranks: tuple[dict[str, Any], ...] = ()
    """What every rank was doing, as `doings` has it."""

    def repeats(self, before: "Fault") -> bool:
        """Whether a rank failed in the same way at the same step: what failed twice alike fails again.

        One retry is justified, for a GPU may flip a bit. Which rank is the first to raise what all do is chance, and
        one resumed right before the bad step has no step to show; one that says nothing, dead or silent, must be the
        same one.
        """
        if self.rank is None or (self.traceback is None) != (before.traceback is None):
            return False
        if self.traceback is None:
            return (self.rank, self.step) == (before.rank, before.step)
        return self.reason == before.reason and self.step in (before.step, None)

    def __str__(self) -> str:
        if self.rank is not None:
            return f"rank {self.rank} (pid {self.pid} on {self.node}): {self.reason}"
        return f"node {self.node}: {self.reason}" if self.node else self.reason


class History:
    """The faults of a run, each with its time in seconds of a monotonic clock."""

    def __init__(self, max_restarts: int) -> None:
        """At most `max_restarts` restarts are worth it within an hour."""
        self._max_restarts = max_restarts
        self.last: Fault | None = None
        self._newest: list[tuple[float, Fault]] = []

    def add(self, fault: Fault, at: float) -> str | None:
        """Why the run should end with this fault; None: it may start again."""
        before, self.last = self.last, fault
        self._newest = [*((then, old) for then, old in self._newest if at - then < HOUR_S), (at, fault)]
        if before and fault.repeats(before):
            return "the generation before failed alike, and so would the next"
        if len(self._newest) > self._max_restarts:
            return f"cluster.max_restarts={self._max_restarts} within an hour is spent"
        return None

    def why_set_aside(self) -> str | None:
        """Why the node of the last fault is suspect, so that it is better to go on without it; None: it is not."""
        fault = self.last
        if not fault or fault.rank is None:
            return None
        if fault.suspects:
            return "it computed wrongly"
        ranks = {old.rank for _, old in self._newest if old.rank is not None and old.node_id == fault.node_id}
        return f"ranks {as_ranges(ranks)} failed there within an hour" if len(ranks) > 1 else None


def doings(
    states: Iterable[WorkerState], nodes: Sequence[str], stacks: Mapping[int, str] | None = None
) -> tuple[dict[str, Any], ...]:
    """What ranks were doing, those of like step, phase and stack together: the fewest first, MOST_GROUPS at most."""
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for state in states:
        alike[state.step, state.phase, (stacks or {}).get(state.rank)].append(state.rank)
    groups = sorted(alike.items(), key=lambda group: (len(group[1]), group[1]))
    return tuple(
        {
            "ranks": as_ranges(ranks),
            "nodes": sorted({nodes[rank] for rank in ranks})[:MOST_GROUPS],
            "step": step,
            "phase": phase,
            **({"stack": stack} if stack else {}),
        }
        for (step, phase, stack), ranks in groups[:MOST_GROUPS]
    )


def as_ranges(ranks: Iterable[int]) -> str:
    """Such as `0-2, 5`."""
    found: list[list[int]] = []
    for rank in sorted(ranks):
        if found and rank == found[-1][1] + 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in found)
