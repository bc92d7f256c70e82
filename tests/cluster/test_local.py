"""One worker in this process, and in a process of its own that is asked to stop."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from counting import Plan, count, counting_from, history

from moray.cluster.events import read_events
from moray.cluster.group import Group, Hooks
from moray.cluster.launch import launch

SCRIPT = Path(__file__).parent / "counting.py"


def test_alone_in_this_process(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    statuses: list[tuple[int, int, dict[str, Any]]] = []
    code = launch(
        count,
        Plan(str(tmp_path), 3),
        "local",
        Group(workers=1),
        Hooks(
            on_event=lambda kind, fields: events.append((kind, fields)),
            on_status=lambda rank, step, status: statuses.append((rank, step, status)),
        ),
    )
    assert code == 0
    assert history(tmp_path) == [(1, 1), (2, 1), (3, 1)]
    assert statuses == [(0, step, {"apples": step}) for step in (1, 2, 3)]
    assert [kind for kind, _ in events] == ["start", "ready", "end"]
    assert [(rank["rank"], rank["pid"]) for rank in events[0][1]["ranks"]] == [(0, os.getpid())]


def test_generations_count_from_the_first(tmp_path: Path) -> None:
    kinds: list[tuple[str, int | None]] = []
    launch(
        count,
        Plan(str(tmp_path), 2),
        "local",
        Group(workers=1),
        Hooks(
            take_generation=counting_from(5),
            on_event=lambda kind, fields: kinds.append((kind, fields.get("generation"))),
        ),
    )
    assert history(tmp_path) == [(1, 5), (2, 5)]
    assert kinds == [("start", 5), ("ready", 5), ("end", None)]


def fail(context: Any, argument: Any) -> int:
    with context.process_group():
        raise KeyError("apples")


def test_an_exception_passes_through_and_leaves_no_process_group() -> None:
    with pytest.raises(KeyError, match="apples"):
        launch(fail, None, "local", Group(workers=1))
    assert not dist.is_initialized()


def test_alone_means_one() -> None:
    with pytest.raises(ValueError, match=r"cluster.workers=2 must be 1"):
        launch(count, None, "local", Group(workers=2))


def test_an_unknown_launcher() -> None:
    with pytest.raises(ValueError, match=r"cluster.launcher='slurmy' is unknown; choose ray, torchrun, slurm or local"):
        launch(count, None, "slurmy", Group(workers=2))  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_without_importing_ray(tmp_path: Path, number: int) -> None:
    watching = "import runpy, sys; import atexit; atexit.register(lambda: print('ray' in sys.modules)); "
    script = watching + f"sys.argv = {[str(SCRIPT), 'local', '1', str(tmp_path), '100000', '0.01']!r}; "
    script += f"sys.path.insert(0, {str(SCRIPT.parent)!r}); runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    worker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout
        assert "step 1 " in worker.stdout.readline()
        worker.send_signal(number)
        *_, imported_ray = worker.stdout.read().splitlines()
        assert worker.wait(30) == 75
    finally:
        worker.kill()
        worker.wait()
    assert imported_ray == "False"
    assert (tmp_path / "stopped-0").exists()
    steps = [step for step, _ in history(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert [event["kind"] for event in read_events(tmp_path / "events.jsonl")] == ["start", "ready", "stop", "end"]
