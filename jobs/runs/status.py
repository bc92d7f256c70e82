"""How a run gets on, from the files in its folder alone: any machine that sees the folder can tell, and needs no torch.

RUN/status.json is the driver's word of itself, some seconds old at most; faults stand in events.jsonl, commits in
checkpoints/, and metrics.jsonl has the last step where the driver had not said one yet.
"""

import json
import os
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from moray import UserError
from moray.cluster.events import read_events
from moray.cluster.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_KILLED_BY_KEYBOARD, EXIT_SUPERSEDED
from moray.cluster.process import Process
from moray.parallel.checkpoint.manifest import DamagedError, Manifest

FILE = "status.json"
BEAT_EVERY_S = 3.0
# A network file system may show a file a minute late, and clocks differ.
LOST_AFTER_S = 120.0

State = Literal["running", "stopped", "failed", "superseded", "done", "lost"]
EXIT_RUNNING = 3
EXIT_CODES: dict[State, int] = {
    "done": EXIT_DONE,
    "failed": EXIT_FAILED,
    "running": EXIT_RUNNING,
    "stopped": EXIT_INTERRUPTED,
    "lost": EXIT_INTERRUPTED,
    "superseded": EXIT_SUPERSEDED,
}
"""What a script may act on. Of a run that is lost the same command resumes, as of one that was stopped."""


class Beat(BaseModel):
    """What status.json holds: one attempt's driver, the newest step that it has heard of, and how it ended.

    Times are unix seconds. `job` has the ids under which schedulers know this attempt. `code` and `why` are None until
    it has ended.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    attempt: str
    driver: Process
    launcher: str
    job: dict[str, str]
    since: float
    time: float
    steps: int
    generation: int | None = None
    workers: int | None = None
    nodes: tuple[str, ...] = ()
    step: int | None = None
    step_time: float | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_per_step: float | None = None
    code: int | None = None
    why: str | None = None


class Status(BaseModel):
    """`moray status --json`. Seconds are ages; what is not known, or does not hold of the state, is null.

    `fault_seconds` are those from each fault until all workers were at work again; `steps_again` counts steps that
    were computed a second time, after whatever fault or kill. `skipped`: sequences that bad steps left out of what is
    committed. `set_aside`: nodes that this attempt does without. `stragglers`: who is slower than the others, now.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    run: str
    state: State
    why: str | None
    host: str | None
    pid: int | None
    since: float | None
    launcher: str | None
    job: dict[str, str]
    generation: int | None
    workers: int | None
    nodes: tuple[str, ...]
    step: int | None
    steps: int | None
    step_seconds_ago: float | None
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    commit_step: int | None
    commit_seconds_ago: float | None
    faults: int
    fault_seconds: float
    steps_again: int
    last_fault: str | None
    skipped: int
    set_aside: tuple[str, ...]
    stragglers: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.state]


def status_of(run: Path) -> Status:
    """The status of the run in a folder. Raises UserError where there is none, OSError where it cannot be read."""
    if not is_run(run):
        raise UserError(f"{run} is not a run; `moray pretrain --run.dir {run} …` makes one")
    now, beat = time.time(), read_beat(run)
    row, steps_again = _metrics(run)
    manifest = _newest_manifest(run / "checkpoints")
    events = _events(run)
    faults = _faults(events)
    steps = beat.steps if beat else _configured_steps(run)
    state, why = _state(beat, manifest.step if manifest else 0, steps, now)
    step = _number(row.get("step")) if beat is None or beat.step is None else beat.step
    pace = beat.seconds_per_step if beat and state == "running" else None
    return Status(
        run=str(run),
        state=state,
        why=why,
        host=beat.driver.host if beat else None,
        pid=beat.driver.pid if beat else None,
        since=beat.since if beat else None,
        launcher=beat.launcher if beat else None,
        job=beat.job if beat else {},
        generation=beat.generation if beat else None,
        workers=beat.workers if beat else None,
        nodes=beat.nodes if beat else (),
        step=None if step is None else int(step),
        steps=steps,
        step_seconds_ago=max(now - beat.step_time, 0) if beat and beat.step_time and state == "running" else None,
        loss=beat.loss if beat and beat.loss is not None else _number(row.get("loss")),
        tokens_per_second=beat.tokens_per_second if beat and state == "running" else None,
        seconds_left=pace * max(beat.steps - (beat.step or 0), 0) if beat and pace is not None else None,
        commit_step=manifest.step if manifest else None,
        commit_seconds_ago=max(now - datetime.fromisoformat(manifest.created).timestamp(), 0) if manifest else None,
        faults=len(faults),
        fault_seconds=sum(seconds for _, seconds in faults),
        steps_again=steps_again,
        last_fault=faults[-1][0] if faults else None,
        skipped=manifest.metadata.get("data", {}).get("skipped", 0) if manifest else 0,
        set_aside=_set_aside(events, beat.since if beat else 0.0),
        stragglers=_stragglers(events) if state == "running" else (),
    )


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (FILE, "events.jsonl"))


def find_runs(named: Sequence[Path]) -> list[Path]:
    """The runs that are meant: a run's folder is itself, any other folder all runs below it, none the folder `runs`.

    Raises UserError for what is no folder, or holds no run.
    """
    runs = []
    for folder in named or [Path("runs")]:
        found = sorted(_below(folder))
        if not found:
            what = "holds no run" if folder.is_dir() else "does not exist"
            raise UserError(f"{folder} {what}; name the folder of a run (its run.dir), or one that holds some")
        runs += found
    return runs


def _below(folder: Path) -> Iterator[Path]:
    for path, folders, _ in os.walk(folder):
        if is_run(Path(path)):
            yield Path(path)
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]


def read_beat(run: Path) -> Beat | None:
    """The driver's word; None where it has left none that can be read."""
    try:
        return Beat.model_validate_json((run / FILE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _state(beat: Beat | None, committed: int, steps: int | None, now: float) -> tuple[State, str | None]:
    if beat and beat.code is not None:
        states: dict[int, State] = {
            EXIT_DONE: "done",
            EXIT_INTERRUPTED: "stopped",
            EXIT_KILLED_BY_KEYBOARD: "stopped",
            EXIT_SUPERSEDED: "superseded",
        }
        return states.get(beat.code, "failed"), beat.why
    if beat:
        is_alive, age = beat.driver.is_alive(), now - beat.time
        if is_alive or (is_alive is None and age < LOST_AFTER_S):
            return "running", None
        why = "is gone, without a word" if is_alive is False else f"has said nothing for {age:,.0f} s"
        lost = f"its driver, pid {beat.driver.pid} on {beat.driver.host}, {why}"
    else:
        lost = f"its driver has left no {FILE}"
    # Whatever cut the driver off came after the last commit.
    return ("done", None) if steps and committed >= steps else ("lost", lost)


def _events(run: Path) -> list[dict[str, Any]]:
    with suppress(FileNotFoundError):
        return list(read_events(run / "events.jsonl"))
    return []


def _faults(events: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """Each fault in a line, and the seconds it took until all workers were at work again (0: they never were)."""
    found: list[tuple[str, float]] = []
    is_open = False
    for event in events:
        kind = event.get("kind")
        if kind == "fault":
            found.append((_fault(event), 0.0))
        elif kind == "recovered":
            # torchrun restarts its workers by itself, and no event tells of what they died.
            reason = found.pop()[0] if is_open else "torchrun started the workers again"
            found.append((reason, _number(event.get("seconds")) or 0.0))
        if kind in ("fault", "recovered", "ready", "end"):
            is_open = kind == "fault"
    return found


def _stragglers(events: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """As the newest word of this generation has them: another one begins with none."""
    for event in reversed(events):
        if event.get("kind") == "start":
            break
        if event.get("kind") == "straggler":
            return tuple(f"rank {one.get('rank')} on {one.get('node')}" for one in event.get("ranks", []))
    return ()


def _set_aside(events: Sequence[dict[str, Any]], since: float) -> tuple[str, ...]:
    return tuple(
        f"{event.get('node')}: {event.get('why')}"
        for event in events
        if event["kind"] == "node_set_aside" and (_number(event.get("time")) or 0.0) >= since
    )


def _fault(event: dict[str, Any]) -> str:
    rank, node = event.get("rank"), event.get("node")
    where = f"rank {rank} on {node}: " if rank is not None else f"node {node}: " if node else ""
    return f"{where}{' '.join(str(event.get('reason')).split())}"


def _metrics(run: Path) -> tuple[dict[str, Any], int]:
    """The last row, and how many steps were computed again: those of before, wherever a resume undid some.

    The file may be long: only the lines that matter are understood.
    """
    again, last = 0, b""
    with suppress(FileNotFoundError), open(run / "metrics.jsonl", "rb") as lines:
        for line in lines:
            if line.startswith(b'{"resumed_from"'):
                undone = (_number(_row(last).get("step")) or 0) - (_number(_row(line).get("resumed_from")) or 0)
                again += max(int(undone), 0)
            elif line.startswith(b"{") and line.endswith(b"\n"):
                last = line
    return _row(last), again


def _row(line: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        row = json.loads(line)
        return row if isinstance(row, dict) else {}
    return {}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < float("inf") else None


def _newest_manifest(folder: Path) -> Manifest | None:
    for path in sorted(folder.glob("step-*/manifest.json"), reverse=True):
        with suppress(DamagedError, FileNotFoundError):
            return Manifest.from_json(path.read_bytes())
    return None


def _configured_steps(run: Path) -> int | None:
    with suppress(FileNotFoundError, ValueError):
        steps = tomllib.loads((run / "config.toml").read_text()).get("train", {}).get("steps")
        return steps if isinstance(steps, int) else None
    return None
