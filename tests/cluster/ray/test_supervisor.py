"""Real workers on a real Ray, killed, suspended and misled while they count."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from counting import Plan, count, counting_from, history, never_begin, sleep_at

from moray import UserError
from moray.cluster.group import Group, Hooks
from moray.cluster.ray.connection import _join
from moray.cluster.ray.faults import Fault, History, as_ranges, doings
from moray.cluster.ray.messages import WorkerState
from moray.cluster.ray.supervisor import supervise
from moray.cluster.worker import WorkerError


class Observer:
    """Keeps all events, and does `act(pid of rank 2)` when rank 0 of generation 1 is at step 10."""

    def __init__(self, act: Callable[[int], None] = lambda pid: None) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.statuses: list[tuple[int, int, dict[str, Any]]] = []
        self._act = act
        self._has_acted = False

    @property
    def hooks(self) -> Hooks:
        return Hooks(self.on_event, self.on_status)

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        if kind != "device":  # of which test_nodes.py speaks
            self.events.append((kind, fields))

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        self.statuses.append((rank, step, status))
        if not self._has_acted and step >= 10:
            self._has_acted = True
            self._act(self.pids(1)[2])

    def kinds(self, but: str = "") -> list[str]:
        return [kind for kind, _ in self.events if kind != but]

    def fields(self, kind: str) -> dict[str, Any]:
        return next(fields for each, fields in self.events if each == kind)

    def pids(self, generation: int) -> list[int]:
        starts = [fields for kind, fields in self.events if kind == "start"]
        return [rank["pid"] for rank in starts[generation - 1]["ranks"]]


@pytest.fixture
def connection(ray_cluster: str) -> Iterator[None]:
    """This process as a driver of the cluster, so that a test can look at what supervise() left there."""
    _join(ray_cluster)  # as Ray's own init would, but for a farewell that may take Ray a minute
    yield
    ray.shutdown()


def counted_once(folder: Path, steps: int) -> bool:
    return [step for step, _ in history(folder)] == list(range(1, steps + 1))


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_every_rank_runs_and_nothing_stays_behind(connection: None, tmp_path: Path) -> None:
    for n_run in range(1, 4):
        observer = Observer()
        folder = tmp_path / str(n_run)
        folder.mkdir()
        code = supervise(
            count,
            Plan(str(folder), 5),
            Group(workers=4),
            observer.hooks,
        )
        assert code == 0
        assert counted_once(folder, 5)
        assert sorted(path.name for path in folder.glob("rank-*")) == [f"rank-{rank}-of-4" for rank in range(4)]
        assert observer.kinds() == ["start", "ready", "end"]
        assert (0, 5, {"apples": 5}) in observer.statuses
        assert all(is_gone(pid) for pid in observer.pids(1))
        groups = ray.util.placement_group_table().values()
        assert [group["state"] for group in groups] == ["REMOVED"] * n_run


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGSTOP, "its process is suspended")],
    ids=["killed", "suspended"],
)
def test_a_lost_worker_costs_one_generation(ray_cluster: str, tmp_path: Path, number: int, reason: str) -> None:
    observer = Observer(lambda pid: os.kill(pid, number))
    code = supervise(
        count,
        Plan(str(tmp_path), 60, pause_s=0.02),
        Group(workers=4, heartbeat_timeout_s=5.0),
        observer.hooks,
    )
    assert code == 0
    assert counted_once(tmp_path, 60)
    assert {generation for _, generation in history(tmp_path)} == {1, 2}
    assert observer.kinds() == ["start", "ready", "fault", "start", "recovered", "end"]
    fault = observer.fields("fault")
    assert (fault["rank"], fault["pid"], fault["generation"]) == (2, observer.pids(1)[2], 1)
    assert reason in fault["reason"]
    assert all(is_gone(pid) for pid in observer.pids(1) + observer.pids(2))


@pytest.mark.parametrize("ancestor", [1, 2], ids=["agent", "actor"])
def test_a_lost_node_is_replaced(ray_cluster: str, tmp_path: Path, ancestor: int) -> None:
    def kill_ancestor(pid: int) -> None:
        for _ in range(ancestor):
            pid = parent_of(pid)
        os.kill(pid, signal.SIGKILL)

    observer = Observer(kill_ancestor)
    plan = Plan(str(tmp_path), 60, pause_s=0.02)
    assert supervise(count, plan, Group(workers=4), observer.hooks) == 0
    assert counted_once(tmp_path, 60)
    assert observer.kinds() == ["start", "ready", "fault", "start", "recovered", "end"]
    assert "was lost" in observer.fields("fault")["reason"]
    assert all(is_gone(pid) for pid in observer.pids(1))


def test_a_suspended_agent_is_a_lost_node(ray_cluster: str, tmp_path: Path) -> None:
    """Its workers count on, unwatched: they end with it before others start."""

    def suspend_agent(pid: int) -> None:
        os.kill(parent_of(pid), signal.SIGSTOP)

    observer = Observer(suspend_agent)
    plan = Plan(str(tmp_path), 300, pause_s=0.02)
    code = supervise(
        count,
        plan,
        Group(workers=4, lease_timeout_s=2.0),
        observer.hooks,
    )
    assert code == 0
    assert observer.kinds() == ["start", "ready", "fault", "start", "recovered", "end"]
    assert "was lost" in observer.fields("fault")["reason"]
    assert counted_once(tmp_path, 300)
    assert all(is_gone(pid) for pid in observer.pids(1))


def test_a_driver_that_was_suspended_goes_on_with_a_new_generation(ray_cluster: str, tmp_path: Path) -> None:
    observer = Observer(lambda pid: time.sleep(7))  # this process is the driver: all it does stands still
    plan = Plan(str(tmp_path), 200, pause_s=0.04)
    code = supervise(
        count,
        plan,
        Group(workers=4, lease_timeout_s=2.0),
        observer.hooks,
    )
    assert code == 0
    assert observer.kinds() == ["start", "ready", "fault", "start", "recovered", "end"]
    reason = observer.fields("fault")["reason"]
    assert re.fullmatch(r"the driver was silent for [23] s: its lease of cluster.lease_timeout_s=2 ended", reason)
    assert counted_once(tmp_path, 200)


def test_steps_longer_than_the_limit_are_no_hangs(ray_cluster: str, tmp_path: Path) -> None:
    observer = Observer()
    plan = Plan(str(tmp_path), 4, pause_s=1.5)
    assert supervise(count, plan, Group(workers=2, heartbeat_timeout_s=0.5), Hooks(on_event=observer.on_event)) == 0
    assert observer.kinds() == ["start", "ready", "end"]


def test_the_rank_that_its_peers_wait_for_is_the_one_at_fault(ray_cluster: str, tmp_path: Path) -> None:
    """All four are silent at the same step. Seen from outside, three are in a collective, and one is not."""
    observer = Observer()
    plan = Plan(str(tmp_path), 20, pause_s=0.02, trouble_at=12)
    assert supervise(sleep_at, plan, Group(workers=4, heartbeat_timeout_s=2.0), observer.hooks) == 0
    assert counted_once(tmp_path, 20)
    fault = observer.fields("fault")
    assert (fault["rank"], fault["step"]) == (1, 11)
    assert re.fullmatch(
        r"silent for [23]\.\d s after step 11, longer than cluster.heartbeat_timeout_s=2; it is in "
        r"sleep_at.<locals>.sleep_instead \(.*\), while ranks 0, 2-3 wait for it in a collective",
        fault["reason"],
    )
    asleep, waiting = fault["ranks"]
    assert (asleep["ranks"], asleep["step"], waiting["ranks"], waiting["step"]) == ("1", 11, "0, 2-3", 11)
    assert asleep["stack"].startswith("sleep_at.<locals>.sleep_instead (")
    assert "all_reduce (torch/distributed/" in waiting["stack"]
    assert " < count (" in waiting["stack"]


def test_a_worker_that_never_begins_is_restarted(ray_cluster: str, tmp_path: Path) -> None:
    observer = Observer()
    plan = Plan(str(tmp_path), 3)
    assert supervise(never_begin, plan, Group(workers=2, startup_timeout_s=1.0), Hooks(on_event=observer.on_event)) == 0
    assert "before its first step, longer than cluster.startup_timeout_s=1" in observer.fields("fault")["reason"]


def test_a_spent_budget_shows_the_first_failure(ray_cluster: str, tmp_path: Path) -> None:
    observer = Observer()
    plan = Plan(str(tmp_path), 10, trouble="RuntimeError", trouble_at=5)
    with pytest.raises(WorkerError) as raised:
        supervise(
            count,
            plan,
            Group(workers=4, max_restarts=0),
            Hooks(take_generation=counting_from(3), on_event=observer.on_event),
        )
    summary, *details = str(raised.value).splitlines()
    spent = "RuntimeError: one too many apples; cluster.max_restarts=0 within an hour is spent"
    assert re.fullmatch(rf"rank 1 \(pid \d+ on .*\): {spent}", summary)
    assert any("counting.py" in line for line in details)
    # A worker that fails at once may do so before the driver has heard that all began.
    assert observer.kinds(but="ready") == ["start", "fault"]
    assert {fields["generation"] for _, fields in observer.events} == {3}


def test_what_failed_twice_alike_is_not_tried_a_third_time(ray_cluster: str, tmp_path: Path) -> None:
    observer = Observer()
    plan = Plan(str(tmp_path), 10, trouble="RuntimeError", trouble_at=5)
    with pytest.raises(WorkerError, match="one too many apples; the generation before failed alike, and so would"):
        supervise(
            count,
            plan,
            Group(workers=4, max_restarts=9),
            Hooks(take_generation=counting_from(7), on_event=observer.on_event),
        )
    assert observer.kinds(but="ready") == ["start", "fault", "start", "fault"]  # step 4 was committed: 5 is the next
    assert [fields["generation"] for kind, fields in observer.events if kind != "ready"] == [7, 7, 8, 8]
    assert observer.fields("fault")["step"] == 4


def test_who_computed_wrongly_is_at_fault_whoever_says_so(ray_cluster: str, tmp_path: Path) -> None:
    observer = Observer()
    plan = Plan(str(tmp_path), 10, trouble="WrongResultError", trouble_at=5)
    with pytest.raises(WorkerError, match=r"^rank 2 \(pid .*\): WrongResultError: one too many apples; the generation"):
        supervise(count, plan, Group(workers=4), Hooks(on_event=observer.on_event))
    fault, kept = observer.fields("fault"), observer.fields("node_kept")
    assert (fault["rank"], fault["suspects"], fault["pid"]) == (2, (2,), observer.pids(1)[2])
    assert (kept["node_id"], kept["why"]) == (fault["node_id"], "it computed wrongly")


def fault(**changes: Any) -> Fault:
    return replace(Fault("RuntimeError: apples", rank=1, pid=9, node="a", traceback="at line 3", step=4), **changes)


@pytest.mark.parametrize(
    ("fault", "before", "repeats"),
    [
        (fault(), fault(pid=10, node="b"), True),
        (fault(), fault(rank=2), True),  # what all ranks raise, any may be the first to raise
        (fault(), fault(step=5), False),
        (fault(), fault(reason="RuntimeError: pears"), False),
        (fault(traceback=None), fault(traceback=None), True),
        (fault(traceback=None), fault(traceback=None, rank=2), False),
        (fault(traceback=None, reason="silent for 5.1 s"), fault(traceback=None, reason="silent for 5.3 s"), True),
        (fault(), fault(traceback=None), False),
        (fault(step=None), fault(step=None), True),
        (fault(step=None), fault(), True),  # resumed right before the bad step, and raised in it again
        (fault(), fault(step=None), False),
        (fault(traceback=None, step=None), fault(traceback=None), False),
        (Fault("was lost", node="a"), Fault("was lost", node="a"), False),
    ],
)
def test_alike_is_the_same_reason_at_the_same_step(fault: Fault, before: Fault, repeats: bool) -> None:
    assert fault.repeats(before) == repeats


def test_restarts_are_counted_within_an_hour() -> None:
    history = History(max_restarts=3)
    for month_s in range(0, 30 * 24 * 3600, 1201):  # three within any hour
        assert history.add(fault(step=month_s), float(month_s)) is None
    assert history.add(fault(step=1), month_s + 10.0) == "cluster.max_restarts=3 within an hour is spent"
    assert History(max_restarts=0).add(fault(), 0.0) == "cluster.max_restarts=0 within an hour is spent"


def test_a_node_on_which_different_ranks_fail_is_suspect() -> None:
    history = History(max_restarts=9)
    for at, rank, node, expected in (
        (0, 1, "a", None),
        (60, 1, "a", None),
        (90, 4, "b", None),
        (99, 2, "a", "ranks 1-2 failed there within an hour"),
        (3700, 3, "a", None),  # of which one had failed an hour before
    ):
        if at == 3700:
            history = History(max_restarts=9)
            history.add(fault(rank=1, node_id="a"), 0.0)
        history.add(fault(rank=rank, node_id=node, step=at), float(at))
        assert history.why_set_aside() == expected
    history.add(Fault("the node or its agent was lost", node="a"), 3800.0)
    assert history.why_set_aside() is None
    history.add(fault(node_id="c", suspects=(1,)), 3900.0)
    assert history.why_set_aside() == "it computed wrongly"


def state(rank: int, step: int | None) -> WorkerState:
    return WorkerState(rank, 100 + rank, step, {}, "step", False, {}, 9.0, 0.1, 0.1, 0.0, None, None)


def test_of_thousands_of_ranks_those_that_do_the_same_are_told_together() -> None:
    states = [state(rank, 4 if rank != 77 else 3) for rank in range(2048)]
    nodes = [f"node{rank // 8}" for rank in range(2048)]
    stacks = dict.fromkeys(range(2048), "all_reduce") | {77: "read", 5: "write"}
    assert doings(states, nodes, stacks)[:2] == (
        {"ranks": "5", "nodes": ["node0"], "step": 4, "phase": "step", "stack": "write"},
        {"ranks": "77", "nodes": ["node9"], "step": 3, "phase": "step", "stack": "read"},
    )
    assert doings(states, nodes, stacks)[2]["ranks"] == "0-4, 6-76, 78-2047"
    everyone_elsewhere = {rank: f"frame {rank}" for rank in range(2048)}
    assert len(str(doings(states, nodes, everyone_elsewhere))) < 4000
    assert as_ranges([]) == ""


def test_two_other_deaths_at_other_steps_are_both_survived(ray_cluster: str, tmp_path: Path) -> None:
    victims = {10: 2, 30: 3}
    observer = Observer()

    def kill(rank: int, step: int, status: dict[str, Any]) -> None:
        for at in [at for at in victims if step >= at]:
            starts = sum(kind == "start" for kind in observer.kinds())
            os.kill(observer.pids(starts)[victims.pop(at)], signal.SIGKILL)

    plan = Plan(str(tmp_path), 50, pause_s=0.02)
    assert supervise(count, plan, Group(workers=4), Hooks(on_event=observer.on_event, on_status=kill)) == 0
    assert counted_once(tmp_path, 50)
    assert {generation for _, generation in history(tmp_path)} == {1, 2, 3}
    assert observer.fields("node_kept")["why"] == "ranks 2-3 failed there within an hour", "there is no other one"


def test_a_users_mistake_is_not_retried(ray_cluster: str, tmp_path: Path) -> None:
    observer = Observer()
    plan = Plan(str(tmp_path), 10, trouble="UserError", trouble_at=5)
    with pytest.raises(UserError, match=r"^one too many apples$"):
        supervise(count, plan, Group(workers=4), Hooks(on_event=observer.on_event))
    assert observer.kinds(but="ready") == ["start", "fault"]


def test_a_librarys_value_error_is_nobodys_mistake(ray_cluster: str, tmp_path: Path) -> None:
    """UnicodeDecodeError and JSONDecodeError are ValueErrors, too: half-read files, say."""
    observer = Observer()
    plan = Plan(str(tmp_path), 10, trouble="ValueError", trouble_at=5)
    with pytest.raises(WorkerError, match="ValueError: one too many apples; the generation before failed alike"):
        supervise(count, plan, Group(workers=4), Hooks(on_event=observer.on_event))
    assert observer.kinds(but="ready") == ["start", "fault", "start", "fault"]


def test_more_workers_than_the_cluster_has(ray_cluster: str, tmp_path: Path) -> None:
    observer = Observer()
    plan = Plan(str(tmp_path), 1)
    with pytest.raises(ValueError, match=r"cluster.workers=9.* after 0\.5 s .*8 CPU slots.*at most 8"):
        supervise(count, plan, Group(workers=9, placement_timeout_s=0.5), Hooks(on_event=observer.on_event))
    assert observer.kinds() == ["wait"]


def test_more_workers_than_others_leave_free(ray_cluster: str, tmp_path: Path) -> None:
    messages: list[str] = []

    def start_another(pid: int) -> None:
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is looked at below
            supervise(count, Plan(str(tmp_path), 1), Group(workers=6, placement_timeout_s=0.5))
        messages.append(str(raised.value))

    observer = Observer(start_another)
    supervise(count, Plan(str(tmp_path), 60, pause_s=0.05), Group(workers=4), observer.hooks)
    assert "only 4 of the cluster's 8 CPU slots are free" in messages[0]


@pytest.mark.parametrize("workers", [0, -1])
def test_less_than_one_worker(workers: int) -> None:
    with pytest.raises(ValueError, match=f"cluster.workers={workers} must be at least 1"):
        supervise(count, Plan("", 1), Group(workers=workers))


def test_a_function_that_no_other_process_can_import() -> None:
    with pytest.raises(ValueError, match="top level of a module"):
        supervise(lambda context, argument: 0, None, Group(workers=1))
