"""How the workers of a run get on: each one's own time and its GPU, and who is slower than the rest."""

import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
from pynvml import NVMLError

from moray.cluster.nvml import find_gpu, read_now
from moray.cluster.own_time import own_time
from moray.cluster.worker import WorkerContext

EVERY = 50
"""Steps between two readings. One is a gather of a few numbers a rank, four questions to NVML, and on several GPUs one
step that is traced."""
SLOWER = 1.25
PERSISTS = 3


class Vitals:
    """Measures this worker's steps; every EVERY steps rank 0 learns of all, for metrics.jsonl and an event."""

    def __init__(self, context: WorkerContext, on_event: Callable[[str, dict[str, Any]], None]) -> None:
        self._context, self._on_event = context, on_event
        device = context.device
        self._gpu = find_gpu(str(torch.cuda.get_device_properties(device).uuid)) if device.type == "cuda" else None
        self._own: list[float] = []
        self._readings: deque[list[float]] = deque(maxlen=PERSISTS)
        self._slow: list[int] = []

    @contextmanager
    def measure(self, step: int, fetching_s: float) -> Iterator[None]:
        """Around the computing of `step`. To wait `fetching_s` for its data is this worker's own time, too."""
        if self._context.device.type == "cuda" and (step % EVERY or self._context.world_size == 1):
            yield
            return
        with own_time(self._context.device) as own_seconds:
            yield
        if (seconds := own_seconds()) is not None:
            self._own.append(fetching_s + seconds)

    def read(self, step: int) -> dict[str, Any]:
        """What the row of this step says beside the training, on rank 0; nothing in most steps. Collective."""
        if step % EVERY:
            return {}
        told: dict[str, Any] = {"node": socket.gethostname(), "own_seconds": mean(self._own) if self._own else None}
        if self._gpu:
            with suppress(NVMLError):  # no reading ends a run: whether this GPU still computes, the next step shows
                told |= read_now(self._gpu).model_dump()
        self._own.clear()
        everyone: list[Any] | None = [None] * self._context.world_size if self._context.rank == 0 else None
        if dist.is_initialized():
            dist.gather_object(told, everyone)
        if everyone is None:
            return {}
        self._look_for_stragglers(step, everyone)
        return summary(everyone)

    def _look_for_stragglers(self, step: int, everyone: Sequence[dict[str, Any]]) -> None:
        own = [told["own_seconds"] for told in everyone]
        if None in own:
            return
        self._readings.append(own)
        slow = stragglers([*self._readings], self._slow)
        if slow != self._slow:
            self._slow = slow
            ranks = [{"rank": rank, "node": everyone[rank]["node"], "own_seconds": own[rank]} for rank in slow]
            self._on_event("straggler", {"step": step, "ranks": ranks, "median_seconds": median(own)})


def stragglers(readings: Sequence[Sequence[float]], before: Sequence[int] = ()) -> list[int]:
    """The ranks that took SLOWER times as long as the median of the others in each of the newest PERSISTS readings.

    readings: own seconds a rank, oldest first. Who was one `before` is so until no reading is left that says so.
    """
    slow: list[set[int]] = [
        {
            rank
            for rank, seconds in enumerate(reading)
            if len(reading) > 1 and seconds > SLOWER * median([*reading[:rank], *reading[rank + 1 :]])
        }
        for reading in readings[-PERSISTS:]
    ]
    always = set.intersection(*slow) if len(slow) == PERSISTS else set[int]()
    return sorted(always | (set(before) & set[int]().union(*slow)))


def summary(everyone: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all ranks, for a step's row: everyone's own seconds, and of the GPUs the worst.

    temperature_c: the hottest; power_w: all together; gpu_memory_bytes: the fullest, of all processes; throttled: how
    many; throttling: why, by rank. What nobody knows is left out.
    """
    known = {
        name: [told[name] for told in everyone if told.get(name) is not None]
        for name in ("own_seconds", "temperature_c", "power_w", "memory_bytes", "throttling")
    }
    row: dict[str, Any] = {}
    if own := known["own_seconds"]:
        row |= {"own_seconds": [told["own_seconds"] for told in everyone], "own_seconds_slowest": max(own)}
    if known["temperature_c"]:
        row["temperature_c"] = max(known["temperature_c"])
    if known["power_w"]:
        row["power_w"] = sum(known["power_w"])
    if known["memory_bytes"]:
        row["gpu_memory_bytes"] = max(known["memory_bytes"])
    if known["throttling"]:
        why = {str(rank): [*told["throttling"]] for rank, told in enumerate(everyone) if told.get("throttling")}
        row |= {"throttled": len(why), "throttling": why}
    return row
