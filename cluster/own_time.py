"""A worker's own time: without what it spends in collectives, where the fast wait for the slow and all look alike.

On a CPU that is the time for which the calling thread is on a core or waits for one: whoever waits for a peer does
neither. A core that is hot, or that others use as well, shows; a disk that is slow does not.

On a GPU that is the time for which any kernel or copy runs but NCCL's, whose kernels wait by running. It takes
CUPTI's tracing, some microseconds a kernel: for a step now and then.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

OwnSeconds = Callable[[], float | None]


@contextmanager
def own_time(device: torch.device) -> Iterator[OwnSeconds]:
    """Yields what tells, after the block, its own seconds; None where the system does not show them."""
    if device.type == "cpu":
        began = _runnable_seconds()
        seconds: list[float] = []
        yield lambda: seconds[0]
        seconds.append(_runnable_seconds() - began)
        return
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield lambda: busy_seconds(_spans(profiler)) or None


def busy_seconds(spans: Iterable[tuple[int, int]]) -> float:
    """The seconds for which any of the spans (begin, end; nanoseconds) lasts: what overlaps counts once."""
    busy_ns = covered_ns = 0
    for begin, end in sorted(spans):
        busy_ns += max(0, end - max(begin, covered_ns))
        covered_ns = max(covered_ns, end)
    return busy_ns / 1e9


def _spans(profiler: profile) -> list[tuple[int, int]]:
    results = profiler.profiler.kineto_results if profiler.profiler else None
    on_device = [event for event in results.events() if event.device_type().name == "CUDA"] if results else []
    return [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in on_device
        if "nccl" not in event.name().lower()
    ]


def _runnable_seconds() -> float:
    queued_ns = 0
    with suppress(OSError):  # no Linux, or one without schedstat
        queued_ns = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    return time.thread_time() + queued_ns / 1e9
