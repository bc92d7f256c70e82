"""Keeps a group of workers going on Ray: starts it, and starts it again after a failure, within a budget."""

import pickle
import time
from dataclasses import asdict
from typing import Any

from ray.exceptions import RayError

from cluster.events import OnEvent, OnStatus
from cluster.generation import Fault, Generation, Watch
from cluster.ray import Gang, connected
from cluster.signals import stop_on_signals
from cluster.worker import EXIT_INTERRUPTED, WorkerFunction


class WorkerError(RuntimeError):
    """The group failed more often than allowed; the message holds the last failed worker's own traceback."""


def supervise(
    function: WorkerFunction,
    argument: Any,
    *,
    workers: int,
    max_restarts: int = 3,
    heartbeat_timeout_s: float = 300.0,
    startup_timeout_s: float = 600.0,
    placement_timeout_s: float = 60.0,
    on_event: OnEvent = lambda kind, fields: None,
    on_status: OnStatus = lambda rank, step, status: None,
) -> int:
    """Runs `function(context, argument)` in `workers` processes on Ray; returns the group's exit code.

    A worker that dies, raises, or gives no heartbeat for `heartbeat_timeout_s` (`startup_timeout_s` before the first
    one) ends its generation: all workers are killed and started again, at most `max_restarts` times. SIGTERM and
    Ctrl-C make `should_stop()` true on all workers; a second Ctrl-C kills them.
    Raises ValueError for what the function itself raises as one (no retry would help), and where the cluster has not
    had enough slots for `placement_timeout_s`; WorkerError once the restarts are spent.
    """
    began = time.monotonic()
    task = _pickle(function, argument)
    if workers < 1:
        raise ValueError(f"cluster.workers={workers} must be at least 1")
    # Connecting to Ray replaces the handler of SIGTERM: ours comes after it.
    with connected(workers) as is_local, stop_on_signals(impatient=True) as should_stop:
        watch = Watch(startup_timeout_s, heartbeat_timeout_s, on_event, on_status, should_stop)
        gang = Gang(task, workers, is_local, placement_timeout_s, on_event)
        try:
            code = _run(gang, watch, max_restarts)
        finally:
            gang.close()
    on_event("end", {"code": code, "seconds": time.monotonic() - began})
    return code


def _run(gang: Gang, watch: Watch, max_restarts: int) -> int:
    number, since = 1, time.monotonic()
    while True:
        outcome = _run_generation(number, gang, watch, since)
        if isinstance(outcome, int):
            return outcome
        since = time.monotonic()
        watch.on_event("fault", {"generation": number, **asdict(outcome)})
        if watch.should_stop():
            return EXIT_INTERRUPTED  # the newest commit stands, and the same command resumes from it
        if outcome.is_users_mistake:
            raise ValueError(outcome.reason)
        if number > max_restarts:
            raise WorkerError(f"{outcome}\nmax_restarts={max_restarts} is spent\n{outcome.traceback or ''}".rstrip())
        number += 1


def _run_generation(number: int, gang: Gang, watch: Watch, since: float) -> int | Fault:
    try:
        gang.fill(watch.should_stop)
    except RayError as error:
        return Fault(f"an agent did not start: {error}")
    if watch.should_stop():
        return EXIT_INTERRUPTED
    generation = Generation(number, gang.nodes, watch)
    try:
        return generation.run(since)
    finally:
        for node in generation.lost:
            gang.drop(node)


def _pickle(function: WorkerFunction, argument: Any) -> bytes:
    """Raises ValueError where another process could not import the function."""
    if function.__module__ == "__main__" or "<" in function.__qualname__:
        raise ValueError(
            f"worker function {function.__qualname__} of {function.__module__} must be importable by other processes: "
            "define it at the top level of a module"
        )
    return pickle.dumps((function, argument))
