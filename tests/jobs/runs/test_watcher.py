"""What a person sees: in a terminal of 80 columns every number whole, in a log file a line now and then."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import TINY

from moray.cluster.events import EventLog
from moray.jobs.config.load import load_config
from moray.jobs.config.run import RunConfig
from moray.jobs.runs import watcher as watching
from moray.jobs.runs.files import Tail
from moray.jobs.runs.watcher import Listener, Watcher, describe, numbers

ROW: dict[str, Any] = {
    "loss": 10.123456,
    "tokens_per_second": 1234567.8,
    "processed_tokens_per_second": 1300000.0,
    "mfu": 0.456,
    "grad_norm": 12.3456,
    "lr": 0.00123,
    "memory_bytes": 61 * 2**30,
    "expert_balance": [1.25, 3.5, 2.0, 1.0, 1.1, 1.2, 1.3, 1.4],
}
SHOWN = ("10.123", "1.23M of 1.30M tokens/s", "MFU 46%", "norm 12.35", "lr 1.2e-03", "61.0 GiB")
BALANCE = "experts max/mean 1.2 3.5 2.0 1.0 1.1 1.2 1.3 1.4"


def watched(run: Path, console: Console) -> Watcher:
    config: RunConfig = load_config(
        None, {**{name: str(value) for name, value in TINY.items()}, "data.path": "d", "run.dir": str(run)}
    )
    return Watcher(config, console, Listener())


def test_the_numbers_fit_80_columns() -> None:
    first, second = numbers(ROW)
    assert all(part in first for part in SHOWN)
    assert second == BALANCE
    assert max(len(first), len(second)) <= 80
    assert len(numbers({**ROW, "expert_balance": []})) == 1, "a dense model has no experts"


def test_a_terminal_of_80_columns_shows_every_number_whole(tmp_path: Path) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)
    with watched(tmp_path, screen) as watcher:
        watcher.on_status(0, 120, ROW)
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    assert all(part in shown for part in (*SHOWN, BALANCE, "120/1000"))
    assert "…" not in shown


def test_many_layers_take_several_lines_rather_than_being_cut(tmp_path: Path) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)
    with watched(tmp_path, screen) as watcher:
        watcher.on_status(0, 1, {**ROW, "expert_balance": [n + 0.5 for n in range(10, 50)]})
    assert isinstance(screen.file, io.StringIO)
    assert all(f"{n}.5" in screen.file.getvalue() for n in range(10, 50))


def test_a_log_file_gets_a_plain_line_now_and_then_and_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[-1])
    log = Console(file=io.StringIO())
    with watched(tmp_path, log) as watcher:
        for step, now in ((1, 3.0), (2, 11.0), (3, 12.0), (4, 13.0)):
            clock.append(now)
            watcher.on_status(0, step, ROW)
        watcher.on_status(1, 4, {})
        watcher.on_status(0, 4, ROW)  # a heartbeat may come again
    assert isinstance(log.file, io.StringIO)
    lines = log.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/1000", "step 4/1000"]
    assert all(part in line for part in (*SHOWN, BALANCE) for line in lines)


def test_events_are_logged_and_those_that_matter_are_told(tmp_path: Path) -> None:
    EventLog(tmp_path / "events.jsonl").write("fault", rank=7, pid=1, reason="of an earlier try")
    log = Console(file=io.StringIO())
    with watched(tmp_path, log) as watcher:
        watcher.on_event("fault", {"generation": 1, "rank": 3, "pid": 99, "reason": "was killed by SIGKILL [9]"})
        EventLog(tmp_path / "events.jsonl").write("commit_refused", step=8, problems=["a.safetensors: cut off"])
        EventLog(tmp_path / "events.jsonl").write("commit_given_up", steps=[7])
    assert isinstance(log.file, io.StringIO)
    assert log.file.getvalue().splitlines() == [
        "fault: rank 3 (pid 99): was killed by SIGKILL [9]",
        "refused the damaged commit of step 8: a.safetensors: cut off",
        "removed the commits of steps [7]: another attempt's, not of this history",
    ]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert kinds == ["fault", "fault", "commit_refused", "commit_given_up"]


def test_a_tail_gives_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert tail.read() == [{"a": 1}, {"a": 2}]
    assert tail.read() == []
    with open(path, "a") as file:
        file.write(': 3}\n{"cut\n{"a": 4}\n')
    assert tail.read() == [{"a": 3}, {"a": 4}], "and passes over what a crash cut short"
    assert Tail(path).read() == [], "what is old is not told again"


def test_a_log_that_is_removed_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = Tail(path)
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert tail.read() == [{"a": 1}, {"a": 2}]
    path.unlink()
    assert tail.read() == []
    path.write_text('{"a": 3}\n')
    assert tail.read() == [{"a": 3}]


def test_the_log_is_looked_at_by_the_clock_and_not_for_each_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looks = [0.0], []
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[-1])
    look = Tail.read
    monkeypatch.setattr(Tail, "read", lambda tail: looks.append(clock[-1]) or look(tail))
    log = Console(file=io.StringIO())
    with watched(tmp_path, log) as watcher:
        EventLog(tmp_path / "events.jsonl").write("commit_failed", error="no room")
        for step in range(1, 11):
            clock.append(float(step))
            for rank in range(2048):
                watcher.on_status(rank, step, ROW)
        assert looks == clock[1:]
        assert isinstance(log.file, io.StringIO)
        assert log.file.getvalue().startswith("no room; the next commit tries again\n")


def test_what_came_by_heartbeat_is_told_once(tmp_path: Path) -> None:
    failed = {"error": "step 8 was not committed: no room"}
    log = Console(file=io.StringIO())
    with watched(tmp_path, log) as watcher:
        for step in (8, 9):
            watcher.on_status(0, step, {**ROW, "told": describe("commit_failed", failed)})
        EventLog(tmp_path / "events.jsonl").write("commit_failed", step=8, **failed)
        EventLog(tmp_path / "events.jsonl").write("commit_failed", step=10, error="step 10 was not committed: no room")
    assert isinstance(log.file, io.StringIO)
    told = [line for line in log.file.getvalue().splitlines() if "committed" in line]
    assert told == [f"step {step} was not committed: no room; the next commit tries again" for step in (8, 10)]


def test_cpus_are_told_of_where_gpus_may_be_on_their_way() -> None:
    assert describe("device", {"device": "cuda"}) is None
    told = describe("device", {"device": "cpu"})
    assert told == "the cluster has no GPU now: the workers take CPUs; cluster.device=cuda would wait for GPUs"


def test_a_fault_of_a_node_has_no_rank() -> None:
    found = describe(
        "fault", {"rank": None, "pid": None, "node": "10.0.0.2", "reason": "the node or its agent was lost"}
    )
    assert found == "fault: node 10.0.0.2: the node or its agent was lost"


def test_a_fault_of_ray_is_nobodys() -> None:
    reason = "the local Ray was lost: its raylet was killed by SIGKILL"
    assert describe("fault", {"rank": None, "pid": None, "node": None, "reason": reason}) == f"fault: {reason}"


def test_what_costs_nothing_but_a_line() -> None:
    told = describe("tracker_failed", {"tracker": "wandb", "error": "no route"})
    assert told == "wandb failed: no route; the run goes on without it, and the next start sends what it lacks"
    told = describe("unprotected", {"address": "head:6379"})
    assert told == (
        "the Ray at head:6379 asks for no token: whoever reaches it can run code as you; "
        "start it with RAY_AUTH_MODE=token"
    )
