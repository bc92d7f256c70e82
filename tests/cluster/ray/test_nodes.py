import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import Plan, count, count_nearly_done, history
from ray._private.state import available_resources_per_node
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from moray import UserError
from moray.cluster.group import Group, Hooks
from moray.cluster.ray.nodes import sound, split
from moray.cluster.ray.supervisor import supervise
from moray.cluster.worker import WorkerError, WorkerFunction


@pytest.mark.parametrize(
    ("missing", "free", "shares"),
    [
        (4, {"a": 8}, {"a": 4}),
        (8, {"a": 8, "b": 8}, {"a": 4, "b": 4}),
        (5, {"a": 8, "b": 8}, {"a": 3, "b": 2}),
        (8, {"a": 1, "b": 8, "c": 8}, {"a": 1, "b": 4, "c": 3}),
        (1, {"a": 0, "b": 2}, {"b": 1}),
        (10, {"a": 2, "b": 8}, {"a": 2, "b": 8}),
        (0, {"a": 2}, {}),
    ],
)
def test_workers_are_shared_out_evenly(missing: int, free: dict[str, int], shares: dict[str, int]) -> None:
    assert split(missing, free) == shares


def test_nodes_that_were_lost_are_asked_only_where_no_others_are_left() -> None:
    free = {"a": 2, "b": 1, "c": 4}
    assert sound(free, {"c"}, lambda slots: slots >= 3) == {"a": 2, "b": 1}
    assert sound(free, {"c"}, lambda slots: slots >= 4) == free
    assert sound(free, set(), lambda slots: slots >= 7) == free


def test_a_lost_ray_node_that_nothing_replaces_is_no_mistake_of_the_user(two_nodes: Cluster, tmp_path: Path) -> None:
    lost: list[Any] = []

    def remove_node(rank: int, step: int, status: dict[str, Any]) -> None:
        if step >= 10 and not lost:
            lost.append(two_nodes.list_all_nodes()[1])
            two_nodes.remove_node(lost[0], allow_graceful=False)

    with pytest.raises(WorkerError) as raised:
        supervise(
            count,
            Plan(str(tmp_path), 1000, pause_s=0.02),
            Group(workers=4, placement_timeout_s=0.5),
            Hooks(on_status=remove_node),
        )
    summary = str(raised.value).splitlines()[0]
    assert "was lost; the cluster had no room for all workers again within cluster.placement_timeout_s=0.5" in summary
    assert summary.endswith("the same command resumes once it has")


def test_a_node_on_which_two_ranks_failed_is_set_aside(two_nodes: Cluster, tmp_path: Path) -> None:
    """Of three nodes, the first has ranks 0 and 1. They are killed one after the other, and it gets no rank again,
    until one of the others is told to go.
    """
    spare = two_nodes.add_node(num_cpus=2)
    events: list[tuple[str, dict[str, Any]]] = []
    to_kill = {10: 0, 30: 1}
    free: list[dict[str, Any]] = []

    def kill(rank: int, step: int, status: dict[str, Any]) -> None:
        starts = [fields for kind, fields in events if kind == "start"]
        if at := next((at for at in to_kill if step >= at and len(starts) == 3 - len(to_kill)), None):
            os.kill(starts[-1]["ranks"][to_kill.pop(at)]["pid"], signal.SIGKILL)
        if step >= 50 and not free:
            free.append(available_resources_per_node())
            aside = next(fields["node_id"] for kind, fields in events if kind == "node_set_aside")
            drain(two_nodes.address, next(node for node in two_nodes.worker_nodes if node.node_id != aside))

    try:
        plan = Plan(str(tmp_path), 300, pause_s=0.02)
        hooks = Hooks(on_event=lambda kind, fields: events.append((kind, fields)), on_status=kill)
        assert supervise(count, plan, Group(workers=4), hooks) == 0
    finally:
        two_nodes.remove_node(spare)
    faults = [fields for kind, fields in events if kind == "fault"]
    assert [fault["rank"] for fault in faults] == [0, 1]
    (aside,) = [fields for kind, fields in events if kind == "node_set_aside"]
    assert aside["why"] == "ranks 0-1 failed there within an hour"
    assert aside["node_id"] == faults[0]["node_id"] == faults[1]["node_id"]
    assert free[0][aside["node_id"]]["CPU"] == 2.0, "nothing runs there any more"
    assert [kind for kind, _ in events][-4:] == ["leaving", "start", "ready", "end"]


def test_a_lost_ray_node_is_replaced_by_a_new_one(two_nodes: Cluster, tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    has_acted = False

    def replace_node(rank: int, step: int, status: dict[str, Any]) -> None:
        nonlocal has_acted
        if step >= 10 and not has_acted:
            has_acted = True
            two_nodes.remove_node(two_nodes.list_all_nodes()[1], allow_graceful=False)
            two_nodes.add_node(num_cpus=2)

    code = supervise(
        count,
        Plan(str(tmp_path), 60, pause_s=0.02),
        Group(workers=4),
        Hooks(on_event=lambda kind, fields: events.append((kind, fields)), on_status=replace_node),
    )
    assert code == 0
    assert [step for step, _ in history(tmp_path)] == list(range(1, 61))
    (fault,) = [fields for kind, fields in events if kind == "fault"]
    assert "was lost" in fault["reason"]
    assert len({output for kind, fields in events if kind == "start" for output in fields["output"]}) == 3


class Tide:
    """A node is lost at step 10; once the others count on, another one joins; and then a person stops it all."""

    def __init__(self, nodes: Cluster) -> None:
        self._nodes = nodes
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._plan = [self._lose, self._join, self._stop]

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        self.events.append((kind, fields))

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        n_begun = sum(kind in ("ready", "recovered") for kind, _ in self.events)
        if step >= 10 and self._plan and n_begun == 4 - len(self._plan):
            self._plan.pop(0)()

    def _lose(self) -> None:
        self._nodes.remove_node(next(iter(self._nodes.worker_nodes)), allow_graceful=False)

    def _join(self) -> None:
        self._nodes.add_node(num_cpus=2)

    def _stop(self) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)  # starting a node of Ray has taken SIGTERM away


def test_a_group_shrinks_with_its_cluster_and_grows_again(
    two_nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is counted twice or left out, and to grow costs no step."""
    monkeypatch.setattr("moray.cluster.ray.resizing.WORTH", 1.0)
    tide, plan = Tide(two_nodes), Plan(str(tmp_path), 100000, pause_s=0.02)
    assert (
        supervise(count, plan, Group(workers=4, min_workers=2, device="cpu"), Hooks(tide.on_event, tide.on_status))
        == 75
    )
    steps = [step for step, _ in history(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert {path.name[-4:] for path in tmp_path.glob("rank-*")} == {"of-4", "of-2"}
    kinds = [kind for kind, _ in tide.events]
    assert kinds == [
        "start",
        "ready",
        "fault",
        "resize",
        "start",
        "recovered",
        "resize",
        "start",
        "ready",
        "stop",
        "end",
    ]
    assert [(fields["workers"], fields["why"]) for kind, fields in tide.events if kind == "resize"] == [
        ([4, 2], "slots were lost"),
        ([2, 4], "there are slots for more"),
    ]


@pytest.mark.parametrize(("function", "resizes"), [(count, [[4, 6]]), (count_nearly_done, [])])
def test_a_group_grows_only_where_that_saves_time(
    two_nodes: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: WorkerFunction,
    resizes: list[list[int]],
) -> None:
    monkeypatch.setattr("moray.cluster.ray.resizing.WORTH", 0.1)
    events: list[tuple[str, dict[str, Any]]] = []
    joined: list[Any] = []

    def join(rank: int, step: int, status: dict[str, Any]) -> None:
        if step >= 10 and not joined:
            joined.append(two_nodes.add_node(num_cpus=2))

    hooks = Hooks(lambda kind, fields: events.append((kind, fields)), join)
    group = Group(workers=6, min_workers=4, device="cpu")
    assert supervise(function, Plan(str(tmp_path), 500, pause_s=0.02), group, hooks) == 0
    assert [fields["workers"] for kind, fields in events if kind == "resize"] == resizes
    assert len(history(tmp_path)) == 500


def drain(address: str, node: Any) -> None:
    in_a_minute = int(1000 * (time.time() + 60))
    preemption = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    assert GcsClient(address=address).drain_node(node.node_id, preemption, "the test's", in_a_minute)[0]


class Farewell:
    """Tells a node of the cluster, as it is at work, that it is to go."""

    def __init__(self, nodes: Cluster, how: str) -> None:
        self._address, self._how = nodes.address, how
        self.node = next(iter(nodes.worker_nodes))
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._is_told = False

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        self.events.append((kind, fields))

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        if step >= 10 and not self._is_told:
            self._is_told = True
            if self._how == "drained":
                drain(self._address, self.node)
            else:
                self._send_sigterm(self._how == "SIGTERM to all")

    def _send_sigterm(self, to_all: bool) -> None:
        """To its agent, whose environment says of which raylet it is, and perhaps to the workers."""
        raylet = self.node.all_processes["raylet"][0].process.pid
        workers = [entry["pid"] for entry in self.events[0][1]["ranks"]]
        agents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in workers}
        for pid, agent in agents.items():
            if f"RAY_RAYLET_PID={raylet}\0" in Path(f"/proc/{agent}/environ").read_text():
                for told in {agent, pid} if to_all else {agent}:
                    os.kill(told, signal.SIGTERM)


@pytest.mark.parametrize("how", ["drained", "SIGTERM to the agent", "SIGTERM to all"])
@pytest.mark.parametrize(
    ("has_spare", "kinds"),
    [
        (True, ["start", "ready", "leaving", "start", "ready", "end"]),
        (False, ["start", "ready", "leaving", "stop", "end"]),
    ],
)
def test_a_node_that_is_told_to_go_is_left_in_time(
    two_nodes: Cluster, tmp_path: Path, has_spare: bool, kinds: list[str], how: str
) -> None:
    """For the spare node, or where there is none, for good: neither is a fault, and no step is done twice."""
    farewell = Farewell(two_nodes, how)
    spare = two_nodes.add_node(num_cpus=2) if has_spare else None
    try:
        hooks = Hooks(farewell.on_event, farewell.on_status)
        code = supervise(count, Plan(str(tmp_path), 300, pause_s=0.02), Group(4, device="cpu"), hooks)
    finally:
        two_nodes.remove_node(farewell.node)
    assert code == (0 if has_spare else 75)
    found = [kind for kind, _ in farewell.events]
    # Workers that were told themselves mostly have ended before anybody could ask them to; on a busy machine not.
    told_first = [kind for kind in kinds if kind != "stop"]
    assert found in ([kinds, told_first] if how == "SIGTERM to all" else [kinds])
    steps = [step for step, _ in history(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert (len(steps) == 300) == has_spare
    assert spare is None or spare in two_nodes.worker_nodes


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_workers_that_need_gpus_wait_for_their_nodes_and_take_no_cpus(
    two_nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU of this test is one that a node only claims to have: the worker that gets it says so."""
    plan = Plan(str(tmp_path), 1)
    with pytest.raises(UserError, match=r"^cluster.device=cuda, but after 0\.5 s the cluster has no GPU; add nodes"):
        supervise(count, plan, Group(workers=1, device="cuda", placement_timeout_s=0.5))

    events: list[tuple[str, dict[str, Any]]] = []

    def add_node(kind: str, fields: dict[str, Any]) -> None:
        events.append((kind, fields))
        if kind == "wait":
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
            two_nodes.add_node(num_cpus=1, num_gpus=1)

    with pytest.raises(UserError, match=r"^cluster.device=cuda, but this machine shows no GPU"):
        supervise(count, plan, Group(workers=1, device="cuda"), Hooks(on_event=add_node))
    assert [kind for kind, _ in events] == ["wait", "start", "fault"]
    assert not list(tmp_path.iterdir())

    events.clear()
    with pytest.raises(UserError, match=r"^cluster.device=cuda, but this machine shows no GPU"):
        supervise(count, plan, Group(workers=1, device="auto"), Hooks(on_event=add_node))
    assert events[0] == ("device", {"device": "cuda"})
    assert supervise(count, plan, Group(workers=1, device="cpu")) == 0


def test_a_cluster_that_loses_its_head_is_named_before_ray_ends_the_driver(two_nodes: Cluster, tmp_path: Path) -> None:
    """The last of this file: it leaves no cluster to the others."""
    events: list[tuple[str, dict[str, Any]]] = []
    has_acted = False

    def kill_head(rank: int, step: int, status: dict[str, Any]) -> None:
        nonlocal has_acted
        if step >= 10 and not has_acted:
            has_acted = True
            two_nodes.head_node.kill_gcs_server()

    address, plan = two_nodes.address, Plan(str(tmp_path), 100000, pause_s=0.02)
    with pytest.raises(WorkerError) as raised:
        supervise(
            count,
            plan,
            Group(workers=4, device="cpu"),
            Hooks(on_event=lambda *event: events.append(event), on_status=kill_head),
        )
    assert str(raised.value) == (
        f"the head of the Ray cluster at {address} does not answer any more; "
        "the same command resumes once there is a cluster"
    )
    assert [kind for kind, _ in events] == ["start", "ready", "fault"]
    pids = [rank["pid"] for rank in events[0][1]["ranks"]]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
