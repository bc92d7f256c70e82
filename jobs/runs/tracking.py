"""Sends metrics.jsonl to a tracker, line by line as it grows: a process a tracker, beside the driver.

The driver's environment has the keys. No step waits for a tracker, and nothing that its library does (fail, hang, wait
at exit for a server) is the run's. RUN/trackers/NAME.json says how far it has come, and the next attempt goes on there.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from moray.cluster.events import EventLog
from moray.cluster.json_lines import NO_ROOM
from moray.cluster.parent import die_with_parent
from moray.jobs.runs.files import Tail, replace_file
from moray.jobs.runs.trackers import Tracker, open_tracker

LOOK_EVERY_S = 1.0
FAREWELL_S = 10.0


class Position(BaseModel):
    """How far a tracker has come: bytes of metrics.jsonl, the last step it has, the newest generation seen."""

    model_config = ConfigDict(frozen=True)

    id: str | None = None
    offset: int = 0
    step: int = 0
    generation: int = 0


@contextmanager
def tracked(run: Path, names: Sequence[str], settings: Mapping[str, Any]) -> Iterator[None]:
    """These trackers follow the run until the block ends, and then for some seconds at most.

    One that fails says so in events.jsonl. `settings` are shown beside the curves.
    """
    processes = {name: _start(run, name, settings) for name in names}
    try:
        yield
    finally:
        for process in processes.values():
            assert process.stdin
            with suppress(OSError):
                process.stdin.close()
        until = time.monotonic() + FAREWELL_S
        for name, process in processes.items():
            why = f"ended with code {process.returncode}"
            try:
                process.wait(max(until - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                why = f"has not taken all within {FAREWELL_S:g} s of the end"
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.returncode:
                _tell(run, name, why)


def _start(run: Path, name: str, settings: Mapping[str, Any]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "moray.jobs.runs.tracking", name, str(run)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdin
    with suppress(OSError):
        process.stdin.write(json.dumps(settings) + "\n")
        process.stdin.flush()
    return process


def main() -> None:
    """Follows until standard input ends: the driver wants to leave. Where it was killed, this one is, too."""
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):  # they ask the run to stop, whose last steps are still to come
        signal.signal(number, signal.SIG_IGN)
    name, run = sys.argv[1], Path(sys.argv[2])
    try:
        _follow(run, name, json.loads(sys.stdin.readline()))
    except Exception as error:  # whatever a network or a library has
        _tell(run, name, " ".join(f"{type(error).__name__}: {error}".split()))


def _tell(run: Path, name: str, why: str) -> None:
    why = re.sub(r"//[^/@\s]+@", "//", why)  # a server's address may hold a password
    if not run.is_dir():  # somebody removed it: an event would make a folder that looks like a run
        return
    with suppress(OSError):
        EventLog(run / "events.jsonl").write("tracker_failed", tracker=name, error=why)


def _follow(run: Path, name: str, settings: Mapping[str, Any]) -> None:
    path = run / "trackers" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    position = _read(path)
    tracker = open_tracker(name, run, settings, position.id, position.step)
    tail = Tail(run / "metrics.jsonl", position.offset)
    generation = position.generation

    def save() -> None:
        now = Position(id=tracker.id, offset=tail.offset, step=tracker.step, generation=generation)
        try:
            tracker.flush()
            replace_file(path, now.model_dump_json())
        except OSError as error:
            if error.errno not in NO_ROOM:  # with room again, the next one says as much
                raise

    save()  # of new curves, the id
    is_last = False
    while not is_last:
        is_last = bool(select.select([sys.stdin], [], [], LOOK_EVERY_S)[0])
        while rows := tail.read():
            for row in rows:
                # An attempt that was overtaken may still write a row.
                if row.get("generation", generation) >= generation:
                    generation = row.get("generation", generation)
                    _send(tracker, row)
            save()
    tracker.close()


def _send(tracker: Tracker, row: dict[str, Any]) -> None:
    if "resumed_from" in row:
        tracker.undo(row["resumed_from"])
    elif row.get("step", 0) > tracker.step:
        tracker.write(row["step"], numbers(row), texts(row))


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers by name; those a layer, a rank or a device have names of their own: `expert_balance/0`."""
    alone = {name: x for name, x in row.items() if _is_number(x) and name != "step"}
    lists = {name: x for name, x in row.items() if isinstance(x, list) and name != "positions"}
    return alone | {f"{name}/{i}": x for name, xs in lists.items() for i, x in enumerate(xs) if _is_number(x)}


def texts(row: Mapping[str, Any]) -> dict[str, str]:
    """What a model that is tuned answered, as Markdown; prompts and answers as they are."""
    parts = {"asked": "prompt", "answered": "written", "expected": "expected"}
    return {
        f"answers/{i}": "\n\n".join(f"**{word}**\n\n{_verbatim(answer[name])}" for word, name in parts.items())
        for i, answer in enumerate(row.get("answers", []))
    }


def _verbatim(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float)


def _read(path: Path) -> Position:
    try:
        return Position.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return Position()


if __name__ == "__main__":
    main()
