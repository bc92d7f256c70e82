"""What is asked of a group of workers, and who hears of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from moray.cluster.devices import Device
from moray.cluster.events import OnEvent, OnStatus
from moray.cluster.worker import CheckGeneration, TakeGeneration, count_up


class Arrangement(Protocol):
    """How a number of workers share the work; `str` of it tells."""

    @property
    def world_size(self) -> int: ...


@dataclass(frozen=True)
class Side:
    """Workers that are all alike, side by side."""

    world_size: int

    def __str__(self) -> str:
        return f"{self.world_size} workers"


@dataclass(frozen=True)
class Group:
    """The fields are the settings `cluster.*` of the same names, times in seconds.

    From `min_workers` (None: no fewer than) to `workers`; `arrange(slots)` is the best that can be made of at most so
    many slots, None: nothing can. Only Ray's workers are watched, and only there do a minimum, times and `max_restarts`
    mean anything.
    """

    workers: int = 1
    min_workers: int | None = None
    arrange: Callable[[int], Arrangement | None] = Side
    device: Device = "auto"
    max_restarts: int = 3
    heartbeat_timeout_s: float = 60.0
    startup_timeout_s: float = 600.0
    lease_timeout_s: float = 20.0
    placement_timeout_s: float = 60.0


@dataclass(frozen=True)
class Hooks:
    """`take_generation` numbers each generation as it begins, `check_generation` is called while the next one waits for
    its nodes; the others hear of events and heartbeats."""

    on_event: OnEvent = lambda kind, fields: None
    on_status: OnStatus = lambda rank, step, status: None
    take_generation: TakeGeneration = count_up
    check_generation: CheckGeneration = lambda number: None


SILENT = Hooks()
