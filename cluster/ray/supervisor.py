"""Keeps a group of workers going on Ray: starts it, and starts it again after a failure, within a budget."""

import pickle
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ray.exceptions import RayError

from moray import UserError
from moray.cluster.exit_codes import EXIT_INTERRUPTED
from moray.cluster.group import SILENT, Arrangement, Group, Hooks
from moray.cluster.ray.address import is_open
from moray.cluster.ray.connection import Connection, RayLostError, connected
from moray.cluster.ray.faults import Fault, History
from moray.cluster.ray.generation import Generation, Watch
from moray.cluster.ray.laps import Laps
from moray.cluster.ray.nodes import Gang, NoRoomError
from moray.cluster.ray.patience import Patience
from moray.cluster.ray.resizing import Resizing
from moray.cluster.signals import stop_on_signals
from moray.cluster.worker import WorkerError, WorkerFunction


def supervise(function: WorkerFunction, argument: Any, group: Group, hooks: Hooks = SILENT) -> int:
    """Runs `function(context, argument)` in the group's workers on Ray; returns the group's exit code.

    Where the group may be smaller, it is while there are slots for no more, and starts anew with more once there are.
    With `device` cuda each takes a GPU, and waits for one; cpu, a CPU slot; auto, GPUs if this Ray has any now.

    A worker that dies, raises, or is silent for too long (see Patience) ends its generation: all workers are killed and
    started again, at most `max_restarts` times within an hour, and on other nodes than one that is suspect, where there
    are some. SIGTERM and Ctrl-C make `should_stop()` true on all workers; a second Ctrl-C kills them. Workers end by
    themselves where this process says nothing for `lease_timeout_s`.
    Raises UserError for what the function itself raises as one (no retry would help), and where the cluster has not
    had enough slots for `placement_timeout_s` at the start; WorkerError where it has not had them after a fault, once
    the restarts are spent, where two generations in a row failed alike, and where the cluster itself is lost.
    """
    began = time.monotonic()
    task = _pickle(function, argument)
    if (group.min_workers or group.workers) < 1:
        raise UserError(f"cluster.workers={group.workers} must be at least 1")
    with stop_on_signals(impatient=True) as should_stop, connected(group.min_workers or group.workers) as connection:
        if is_open(connection.address):
            hooks.on_event("unprotected", {"address": connection.address})
        patience = Patience(group.startup_timeout_s, group.heartbeat_timeout_s, group.lease_timeout_s)
        gang = Gang(task, group, connection, hooks.on_event)
        resizing = Resizing(gang, hooks.on_event)

        def stop() -> bool:
            return should_stop() or resizing.must_end

        def hear(rank: int, step: int, status: dict[str, Any]) -> None:
            resizing.left_s = status.get("left_s", resizing.left_s)
            hooks.on_status(rank, step, status)

        watch = Watch(patience, hooks.on_event, hear, stop, connection.check, resizing.is_due)
        try:
            code = _run(connection, gang, resizing, watch, hooks, group.max_restarts)
        finally:
            resizing.close()
            gang.close()
    hooks.on_event("end", {"code": code, "seconds": time.monotonic() - began})
    return code


def _run(connection: Connection, gang: Gang, resizing: Resizing, watch: Watch, hooks: Hooks, max_restarts: int) -> int:
    """Runs generations, as many as it takes; returns the exit code of the last one."""
    laps, is_lost, is_after_fault = Laps(time.monotonic()), False, False
    number: int | None = None
    before: Arrangement | None = None
    history = History(max_restarts)
    outcome: int | Fault | None

    def should_leave() -> bool:
        if number is not None:
            hooks.check_generation(number)
        return watch.should_stop()

    while True:
        try:
            if is_lost:
                connection.renew()
                is_lost = False
            outcome = _fill(gang, should_leave, history.last)
            if not outcome and watch.should_stop():
                return EXIT_INTERRUPTED
            if not outcome:
                # As late as can be: whoever takes one puts an end to all others.
                number = hooks.take_generation(number)
                laps.lap("placing")
                now = gang.arrangement
                assert now
                if before and str(before) != str(now):
                    reason = resizing.why or "slots were lost"
                    sizes = {"workers": [before.world_size, now.world_size], "from": str(before), "to": str(now)}
                    watch.on_event("resize", {"generation": number, **sizes, "why": reason})
                before = now
                resizing.begin(now.world_size)
                generation = Generation(number, gang.crew, watch, "recovered" if is_after_fault else "ready")
                outcome = generation.run(laps)
                if outcome == EXIT_INTERRUPTED and not watch.should_stop() and resizing.is_to_go_on():
                    laps, is_after_fault = Laps(time.monotonic()), False
                    gang.give_up(gang.leaving(gang.look()))
                    continue
                laps = Laps(generation.noticed)
                laps.lap("killing")
                gang.drop(generation.lost)
        except RayLostError as error:
            gang.abandon()
            connection.close()
            outcome, is_lost, laps = Fault(str(error)), True, Laps(time.monotonic())
        if isinstance(outcome, int):
            return outcome
        is_after_fault = True
        watch.on_event("fault", {"generation": number, **asdict(outcome)})
        if watch.should_stop():
            return EXIT_INTERRUPTED  # the newest commit stands, and the same command resumes from it
        if outcome.is_users_mistake:
            raise UserError(outcome.reason)
        if why_no_more := history.add(outcome, time.monotonic()):
            raise _worker_error(outcome, why_no_more)
        if outcome.node_id and (why := history.why_set_aside()):
            is_aside = gang.set_aside(outcome.node_id)
            if is_aside or not connection.is_local:  # a lone machine can but stay
                kind = "node_set_aside" if is_aside else "node_kept"
                watch.on_event(kind, {"node": outcome.node, "node_id": outcome.node_id, "why": why})


def _worker_error(fault: Fault, why_no_more: str) -> WorkerError:
    summary = f"{' '.join(str(fault).split())}; {why_no_more}"
    return WorkerError(f"{summary}\n{fault.traceback or ''}".rstrip())


def _fill(gang: Gang, should_leave: Callable[[], bool], before: Fault | None) -> Fault | None:
    """Has the gang fill its slots; returns why an agent did not start."""
    try:
        gang.fill(should_leave)
    except RayError as error:
        return Fault(f"an agent did not start: {error}")
    except NoRoomError:
        if not before:
            raise
        room = f"the cluster had no room for all workers again within cluster.placement_timeout_s={gang.patience_s:g}"
        raise _worker_error(before, f"{room}; the same command resumes once it has") from None
    return None


def _pickle(function: WorkerFunction, argument: Any) -> bytes:
    """Raises UserError where another process could not import the function."""
    if function.__module__ == "__main__" or "<" in function.__qualname__:
        raise UserError(
            f"worker function {function.__qualname__} of {function.__module__} must be importable by other processes: "
            "define it at the top level of a module"
        )
    return pickle.dumps((function, argument))
