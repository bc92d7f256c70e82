"""A worker function that counts, and the marks by which a test finds its processes.

Run as a script it is a driver: python counting.py LAUNCHER WORKERS FOLDER STEPS PAUSE_S [LEASE_TIMEOUT_S].
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from moray import UserError
from moray.cluster.events import EventLog, read_events
from moray.cluster.exit_codes import EXIT_INTERRUPTED
from moray.cluster.group import Group, Hooks
from moray.cluster.launch import launch
from moray.cluster.worker import TakeGeneration, WorkerContext, WrongResultError

TROUBLES = {
    **{kind.__name__: kind for kind in (RuntimeError, ValueError, UserError)},
    "WrongResultError": lambda words: WrongResultError(words, (2,)),
}


@dataclass(frozen=True)
class Plan:
    """Count to `steps`; on rank 1, from step `trouble_at` on, raise the exception named `trouble`, if any."""

    folder: str
    steps: int
    pause_s: float = 0.0
    trouble: str = ""
    trouble_at: int = 0


def history(folder: str | Path) -> list[tuple[int, int]]:
    """The committed steps, each with its generation."""
    path = Path(folder) / "steps"
    rows = path.read_text().splitlines() if path.exists() else []
    return [(int(step), int(generation)) for step, generation in map(str.split, rows)]


def count(context: WorkerContext, plan: Plan) -> int:
    """Counts together with the other ranks, commits every step, and goes on from the last one committed."""
    Path(plan.folder, f"rank-{context.rank}-of-{context.world_size}").touch()
    with context.process_group():
        done = history(plan.folder)
        step = done[-1][0] if done else 0
        dist.barrier()
        while step < plan.steps:
            votes = torch.tensor([1, int(context.should_stop())])
            dist.all_reduce(votes)
            assert votes[0] == context.world_size
            step += 1
            if plan.trouble and context.rank == 1 and step >= plan.trouble_at:
                raise TROUBLES[plan.trouble]("one too many apples")
            if context.rank == 0:
                with open(Path(plan.folder, "steps"), "a") as steps:
                    steps.write(f"{step} {context.generation}\n")
            context.heartbeat(step, apples=step)
            if votes[1]:
                Path(plan.folder, f"stopped-{context.rank}").touch()
                return EXIT_INTERRUPTED
            time.sleep(plan.pause_s)
    return 0


def never_begin(context: WorkerContext, plan: Plan) -> int:
    """Hangs before its first heartbeat in generation 1."""
    if context.generation == 1:
        time.sleep(1000)
    return count(context, plan)


def count_nearly_done(context: WorkerContext, plan: Plan) -> int:
    """Says at every step that it will be done in a moment."""
    heartbeat = context.heartbeat
    object.__setattr__(context, "heartbeat", lambda step, **status: heartbeat(step, left_s=0.01, **status))
    return count(context, plan)


def sleep_at(context: WorkerContext, plan: Plan) -> int:
    """As `count`, but in generation 1 rank 1 sleeps for ever instead of step `trouble_at`."""
    heartbeat = context.heartbeat

    def sleep_instead(step: int, **status: object) -> None:
        heartbeat(step, **status)
        if (context.generation, context.rank, step + 1) == (1, 1, plan.trouble_at):
            time.sleep(1000)

    object.__setattr__(context, "heartbeat", sleep_instead)
    return count(context, plan)


def beat(context: WorkerContext, n_beats: int) -> int:
    for step in range(n_beats):
        context.heartbeat(step, words="x" * 100)
    return 0


def look_once(context: WorkerContext, path: str) -> int:
    """Appends to `path` that it looked, and what it found: the number of its generation."""

    def look() -> int:
        with open(path, "a") as file:
            file.write(f"looked in {context.generation}\n")
        return context.generation

    found = context.once("generation", look)
    return found if found == 1 else 100


def end_silently(context: WorkerContext, argument: None) -> int:
    os._exit(3)


def leave_a_helper(context: WorkerContext, path: str) -> int:
    """Ends well, but leaves a process behind, whose pid it writes to `path`."""
    helper = subprocess.Popen(["sleep", "1000"])
    Path(path).write_text(str(helper.pid))
    return 0


def next_generation(events: Path) -> int:
    """One more than the highest that the log knows: the first of a driver that was started again."""
    return 1 + max((event.get("generation", 0) for event in read_events(events)), default=0) if events.exists() else 1


def counting_from(first: int) -> TakeGeneration:
    return lambda previous: first if previous is None else previous + 1


if __name__ == "__main__":
    from counting import Plan, count  # the workers import it under this name

    launcher, workers, folder, steps, pause_s, *lease_s = sys.argv[1:]
    events = Path(folder, "events.jsonl")
    code = launch(
        count,
        Plan(folder, int(steps), float(pause_s)),
        launcher,
        Group(workers=int(workers), lease_timeout_s=float(*lease_s) if lease_s else 20.0),
        Hooks(
            take_generation=counting_from(next_generation(events)),
            on_event=lambda kind, fields: EventLog(events).write(kind, **fields),
            on_status=lambda rank, step, status: print(f"{os.getpid()} rank {rank} step {step} {status}", flush=True),
        ),
    )
    sys.exit(code)
