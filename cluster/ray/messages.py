"""What driver, agents and workers tell each other. Imports neither torch nor Ray, so that all of them can."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Assignment:
    """One node's part in one generation: `n_workers` ranks from `first_rank` on; rank 0's store is at host:port.

    The workers live for `lease_s` seconds after the last call that came from the driver.
    `device` is the kind of slots that the ranks hold.
    """

    generation: int
    world_size: int
    first_rank: int
    n_workers: int
    host: str
    port: int
    lease_s: float
    device: Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Note:
    """What a worker found out about its node, for the workers of later generations."""

    name: str
    value: Any


@dataclass(frozen=True)
class Phase:
    """What a worker does from now on."""

    name: str


@dataclass(frozen=True)
class Failure:
    """Why a worker ended before its time. `time` is unix seconds; `traceback` is None where it died without a word."""

    reason: str
    time: float
    traceback: str | None = None
    is_users_mistake: bool = False


@dataclass(frozen=True)
class WorkerState:
    """What its agent knows of a worker: the last heartbeat (step None before the first), and how it ended, if so.

    `longest_silence_s` is the longest that lay between two heartbeats; None until a step has been seen from its
    beginning to its end, for what comes before says nothing about steps. `phase` is what it does now; `entered` says
    when it began with each phase for the first time, in seconds after its fork.
    """

    rank: int
    pid: int
    step: int | None
    status: dict[str, Any]
    phase: str
    entered: dict[str, float]
    silent_s: float
    longest_silence_s: float | None
    is_suspended: bool
    exit_code: int | None
    failure: Failure | None
