"""What driver, agents and workers tell each other. Imports neither torch nor Ray, so that all of them can."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Assignment:
    """One node's part in one generation: the `node`-th of the `ranks` of all nodes; rank 0's store is at host:port.

    The workers live for `lease_s` seconds after the last call that came from the driver.
    `device` is the kind of slots that the ranks hold.
    """

    generation: int
    ranks: tuple[range, ...]
    node: int
    host: str
    port: int
    lease_s: float
    device: Literal["cpu", "cuda"]

    @property
    def own_ranks(self) -> range:
        return self.ranks[self.node]

    @property
    def mirrored_ranks(self) -> range:
        """Those of the node before, for which this one keeps a second copy of what they leave in memory."""
        return self.ranks[self.node - 1] if len(self.ranks) > 1 else range(0)


@dataclass(frozen=True)
class Note:
    """What a worker found out about its node, for the workers of later generations."""

    name: str
    value: Any


@dataclass(frozen=True)
class Phase:
    """What a worker does from now on; if that is long, it may be silent meanwhile."""

    name: str
    is_long: bool


@dataclass(frozen=True)
class Failure:
    """Why a worker ended before its time. `time` is unix seconds; `traceback` is None where it died without a word.

    `suspects` are ranks whose hardware has computed wrongly, or that of one of them.
    """

    reason: str
    time: float
    traceback: str | None = None
    is_users_mistake: bool = False
    suspects: tuple[int, ...] = ()


@dataclass(frozen=True)
class WorkerState:
    """What its agent knows of a worker: the last heartbeat (step None before the first), and how it ended, if so.

    `usual_silence_s` is what hardly any silence between two heartbeats exceeds, `longest_silence_s` the longest one;
    None until a step has been seen from its beginning to its end, for what comes before says nothing about steps.
    `suspended_s`: for how long its process has been suspended. `phase` is what it does now, and `is_long` if it may be
    silent meanwhile; `entered` says when it began with each phase first, in seconds after its fork.
    """

    rank: int
    pid: int
    step: int | None
    status: dict[str, Any]
    phase: str
    is_long: bool
    entered: dict[str, float]
    silent_s: float
    usual_silence_s: float | None
    longest_silence_s: float | None
    suspended_s: float
    exit_code: int | None
    failure: Failure | None
