"""Where workers may run: the nodes of a Ray cluster, a placement group on each, and an agent in it."""

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from socket import create_connection
from typing import Any, Literal, NamedTuple

import grpc
import ray
from ray._private.state import available_resources_per_node, state
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moray import UserError
from moray.cluster.events import OnEvent
from moray.cluster.group import Arrangement, Group
from moray.cluster.ray.actor import AgentActor
from moray.cluster.ray.address import ask
from moray.cluster.ray.connection import Connection
from moray.cluster.versions import difference, versions

AGENT_START_S = 120.0
ANSWER_S = 2.0
RETRY_S = 0.2
FAREWELL_S = 5.0
SETTLE_S = 0.5
RESOURCES = {"cpu": "CPU", "cuda": "GPU"}
POLLS = "polls"


@dataclass(frozen=True, eq=False)
class Node:
    """Some slots of one machine, reserved, with the agent that runs workers in them.

    `versions` are the agent's, and known before it is `loaded`, with which another one may have trouble.
    """

    node_id: str
    host: str
    slots: int
    device: Literal["cpu", "cuda"]
    group: PlacementGroup
    actor: Any
    versions: ray.ObjectRef
    loaded: ray.ObjectRef

    def call(self, method: str, *arguments: Any) -> ray.ObjectRef:
        return self.actor.call.remote(method, *arguments)

    def poll(self, wait_s: float) -> ray.ObjectRef:
        """What became of the workers, with news or after so long. Another call does not wait for it, but ends it."""
        return self.actor.call.options(concurrency_group=POLLS).remote("poll", wait_s)

    def release(self) -> None:
        # Ray kills what its actor started; the agent also ends by itself when its owner is gone.
        with suppress(RayError):
            ray.kill(self.actor)
            remove_placement_group(self.group)


def split(missing: int, free: Mapping[str, int]) -> dict[str, int]:
    """Shares `missing` workers out over nodes as evenly as their free slots allow: node -> workers (at least one).

    The free slots must suffice.
    """
    shares = dict.fromkeys(free, 0)
    for _ in range(missing):
        node = min((node for node in free if shares[node] < free[node]), key=lambda node: shares[node])
        shares[node] += 1
    return {node: share for node, share in shares.items() if share}


def sound(free: Mapping[str, int], avoided: Collection[str], suffice: Callable[[int], bool]) -> Mapping[str, int]:
    """The free slots without those of nodes that were lost or set aside, if so many `suffice`; else all.

    Ray needs up to a minute to see that a node has gone, and until then would have us wait for an agent there.
    """
    others = {node: slots for node, slots in free.items() if node not in avoided}
    return others if suffice(sum(others.values())) else free


class Slots(NamedTuple):
    """All slots and the free ones of every node that is alive and stays, by its id; and the nodes that will go."""

    total: dict[str, int]
    free: dict[str, int]
    draining: Collection[str]


class NoRoomError(UserError):
    """The cluster has fewer free slots than workers."""


class Gang:
    """The nodes that hold the workers' slots. Survivors of a failure stay; `fill` replaces what was lost."""

    def __init__(self, task: bytes, group: Group, connection: Connection, on_event: OnEvent) -> None:
        """Device auto: what this Ray has now, and the same for all generations, whatever nodes join later."""
        self.nodes: list[Node] = []
        self._avoided: set[str] = set()
        self._gap = 0
        """Where in `nodes` the next ones belong: in the place of those that were lost, so that other ranks stay."""
        self._joining: list[Node] = []
        self._task, self._versions = task, versions()
        self._most, self._least = group.workers, group.min_workers or group.workers
        self._arrange = group.arrange
        self._connection = connection
        self.patience_s = group.placement_timeout_s
        self._on_event = on_event
        of_ray: Literal["cpu", "cuda"] = "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
        self._device = of_ray if group.device == "auto" else group.device
        self._resource = RESOURCES[self._device]
        if group.device == "auto" and not connection.is_local:
            on_event("device", {"device": self._device})

    @property
    def arrangement(self) -> Arrangement | None:
        """Of workers in the slots that there are; None: they are too few."""
        return self._arranged(self._held)

    @property
    def crew(self) -> list[tuple[Node, int]]:
        """Nodes with workers, and how many; the slots that no arrangement has a use for are the last ones."""
        left, found = (arrangement.world_size if (arrangement := self.arrangement) else 0), []
        for node in self.nodes:
            if share := min(node.slots, left):
                found.append((node, share))
                left -= share
        return found

    @property
    def is_elastic(self) -> bool:
        return self._least < self._most

    @property
    def _held(self) -> int:
        return sum(node.slots for node in self.nodes)

    def _arranged(self, slots: int) -> Arrangement | None:
        found = self._arrange(min(slots, self._most)) if slots >= self._least else None
        return found if found and found.world_size >= self._least else None

    def fill(self, should_leave: Callable[[], bool]) -> None:
        """Reserves slots, if those held are too few, and starts their agents; waits for them at most `patience_s`.

        Returns without them where it is to leave. Raises NoRoomError where the cluster stays too small or too busy,
        UserError where a node has other versions than this driver, RayLostError where the cluster is gone.
        """
        began = time.monotonic()
        has_told = False
        while not self.arrangement:
            self._connection.check()
            if should_leave():
                return
            self._take_in()
            total, free, _ = self.look()
            while (new := self._within_reach(free)) and (silent := _silent(new)):
                free = {node: slots for node, slots in free.items() if node not in silent}
            if new:
                self._place(new)
                continue
            # A cluster may still be growing; a machine is not.
            patience_s = 0.0 if self._connection.is_local and sum(total.values()) < self._least else self.patience_s
            if time.monotonic() - began >= patience_s:
                raise NoRoomError(self._too_few(sum(total.values()), sum(free.values()), patience_s))
            if not has_told:
                has_told = True
                missing = self._least - self._held
                self._on_event("wait", {"workers": missing, "free": sum(free.values()), "patience_s": patience_s})
            time.sleep(RETRY_S)

    def _within_reach(self, free: Mapping[str, int]) -> dict[str, int]:
        """The slots of each node that could be had besides those held, if both together suffice."""
        usable = sound(free, self._avoided, lambda slots: bool(self._arranged(self._held + slots)))
        n_new = min(sum(usable.values()), self._most - self._held)
        return split(n_new, usable) if self._arranged(self._held + n_new) else {}

    def grow(self, seen: Slots) -> None:
        """Begins to reserve slots with which more workers could be at work, and takes in those whose agents are ready.

        Never waits. A node whose agent does not start, or has other versions, is not asked again.
        """
        self._take_in()
        if self._joining or self._held == self._most:
            return
        others = {node: slots for node, slots in seen.free.items() if node not in self._avoided}
        new = self._within_reach(others)
        now, then = self.arrangement, self._arranged(self._held + sum(new.values()))
        if now and then and then.world_size > now.world_size:
            self._joining = self._reserve_all(new)

    def _take_in(self) -> None:
        loaded = [node.loaded for node in self._joining]
        if not loaded or ray.wait(loaded, num_returns=len(loaded), timeout=0)[1]:
            return
        joining, self._joining = self._joining, []
        for node in joining:
            try:
                self._wait_for(node)
                self.nodes.append(node)
            except (RayError, UserError):
                self._avoided.add(node.node_id)
                node.release()

    def drop(self, nodes: Sequence[Node]) -> None:
        """Gives up nodes that were lost. Raises RayLostError where what took them away was the end of Ray itself."""
        if not nodes:
            return
        time.sleep(SETTLE_S)  # that end takes a moment to show, and a lost Ray cannot release anything
        self._connection.check()
        self.give_up(nodes)

    def set_aside(self, node_id: str) -> bool:
        """Gives up a node that is suspect, where others have room for its workers; otherwise it stays: False."""
        suspect = [node for node in self.nodes if node.node_id == node_id]
        if not suspect or not self.can_do_without(suspect, self.look(), self._avoided):
            return False
        self.give_up(suspect)
        return True

    def can_do_without(self, nodes: Sequence[Node], seen: Slots, avoided: Collection[str] = ()) -> bool:
        """Whether the slots of the other nodes suffice, and those that could be had, but for those `avoided`."""
        avoided = {*avoided, *(node.node_id for node in nodes)}
        room = sum(slots for node_id, slots in seen.free.items() if node_id not in avoided)
        return self._arranged(self._held - sum(node.slots for node in nodes) + room) is not None

    def leaving(self, seen: Slots) -> list[Node]:
        """Those that have been told to go, and will soon be gone."""
        return [node for node in self.nodes if node.node_id in seen.draining]

    def give_up(self, nodes: Sequence[Node]) -> None:
        """Has their workers' slots back, and asks them for none again while others have some."""
        self._gap = min(map(self.nodes.index, nodes), default=self._gap)
        for node in nodes:
            self.nodes.remove(node)
            self._avoided.add(node.node_id)
            node.release()

    def abandon(self) -> None:
        """Gives up all nodes of a Ray that is lost. Agents in a cluster may be within reach even so: they are told."""
        if not self._connection.is_local:
            kills = [node.call("kill") for node in self.nodes]
            ray.wait(kills, num_returns=len(kills), timeout=FAREWELL_S)
        self.nodes, self._joining = [], []

    def close(self) -> None:
        """Ends all workers and gives their slots back."""
        for node in (*self.nodes, *self._joining):
            node.release()
        self.nodes, self._joining = [], []

    @property
    def is_local(self) -> bool:
        return self._connection.is_local

    def is_within_reach(self) -> bool:
        """Whether the head answers now."""
        return ask(self._connection.address, ANSWER_S) == grpc.StatusCode.OK

    def look(self) -> Slots:
        """What the cluster has now. Waits for its head."""
        available = available_resources_per_node()
        draining = self._told() | (set() if self._connection.is_local else set(state.get_draining_nodes()))
        alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
        total = {node["NodeID"]: int(node["Resources"].get(self._resource, 0)) for node in alive}
        free = {node: int(available.get(node, {}).get(self._resource, 0)) for node in total}
        return Slots(total, free, draining)

    def _told(self) -> set[str]:
        """The nodes whose agents have got SIGTERM, as schedulers send it to all that runs there."""
        node_of = {node.call("is_told_to_end"): node.node_id for node in self.nodes}
        answers = ray.wait([*node_of], num_returns=len(node_of), timeout=ANSWER_S)[0] if node_of else []
        with suppress(RayError):  # one that is lost is a fault, and told as one
            return {node_of[answer] for answer in answers if ray.get(answer)}
        return set()

    def _too_few(self, total: int, free: int, patience_s: float) -> str:
        asked = f"cluster.workers={self._least if self._least == self._most else f'{self._least}:{self._most}'}, but"
        if total < self._least and self._connection.is_local:  # only GPUs can be too few: CPU slots were made to fit
            return f"{asked} this machine has {total} GPUs; choose at most {total}, or cluster.device=cpu"
        if total == 0 and self._device == "cuda":
            return f"cluster.device=cuda, but after {patience_s:g} s the cluster has no GPU; add nodes that have some"
        slots = f"{total} {self._resource} slots"
        if total < self._least:
            return f"{asked} after {patience_s:g} s the cluster has {slots}; choose at most {total}, or add nodes"
        return (
            f"{asked} after {patience_s:g} s only {free} of the cluster's {slots} are free; "
            + (f"choose at most {free}, or " if free else "")
            + "wait until others have finished"
        )

    def _place(self, shares: Mapping[str, int]) -> None:
        """Reserves each node's share and starts its agent; raises RayError where one does not start."""
        started = self._reserve_all(shares)
        self.nodes[self._gap : self._gap] = started
        for node in started:
            try:
                self._wait_for(node)
            except RayError:
                self.drop([node])
                raise

    def _wait_for(self, node: Node) -> None:
        theirs = self._get(node.versions)
        if differs := difference(self._versions, theirs):
            name, of_driver, of_node = differs
            raise UserError(
                f"{name} is {of_node} on node {node.host}, but {of_driver} here, where the driver is; install the "
                "same on all nodes"
            )
        self._get(node.loaded)

    def _get(self, answer: ray.ObjectRef) -> Any:
        deadline = time.monotonic() + AGENT_START_S
        while not ray.wait([answer], timeout=RETRY_S)[0] and time.monotonic() < deadline:
            self._connection.check()
        return ray.get(answer, timeout=0)

    def _reserve_all(self, shares: Mapping[str, int]) -> list[Node]:
        hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        return [self._reserve(node_id, hosts[node_id], slots) for node_id, slots in shares.items()]

    def _reserve(self, node_id: str, host: str, slots: int) -> Node:
        group = placement_group(
            [{self._resource: float(slots)}],
            strategy="STRICT_PACK",
            bundle_label_selector=[{"ray.io/node-id": node_id}],
        )
        remote: Any = ray.remote  # its types know of no concurrency groups
        actor = (
            remote(concurrency_groups={POLLS: 1})(AgentActor)
            .options(
                num_cpus=slots if self._resource == "CPU" else 0,
                num_gpus=slots if self._resource == "GPU" else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group),
            )
            .remote(sys.path)
        )
        found, loaded = actor.call.remote("versions"), actor.call.remote("load", self._task, host)
        return Node(node_id, host, slots, self._device, group, actor, found, loaded)


def _silent(node_ids: Collection[str]) -> set[str]:
    """Those whose raylet accepts no connection: Ray takes a minute to see that a network has failed, or a machine."""

    def ask(node: dict[str, Any]) -> str | None:
        with suppress(OSError), create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_S):
            return None
        return str(node["NodeID"])

    asked = [node for node in ray.nodes() if node["NodeID"] in node_ids]
    with ThreadPoolExecutor(len(asked) or 1) as pool:
        return {silent for silent in pool.map(ask, asked) if silent}
