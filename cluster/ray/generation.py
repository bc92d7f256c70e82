"""One generation of the group: start its workers on the nodes, watch them, and end them all when one fails."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from moray.cluster.events import OnEvent, OnStatus
from moray.cluster.ray.agent import POLL_S
from moray.cluster.ray.connection import RayLostError
from moray.cluster.ray.faults import Fault, as_ranges, doings
from moray.cluster.ray.laps import Laps
from moray.cluster.ray.messages import Assignment, WorkerState
from moray.cluster.ray.nodes import Node
from moray.cluster.ray.patience import Patience
from moray.cluster.ray.stacks import UNSEEN, waits_for_peers

TICK_S = 0.5
GATHER_S = 0.05
ANSWERS_PER_S = 50
"""How many answers without news a driver asks for, of all nodes together: each costs it most of a millisecond."""
SETTLE_S = 0.1
CALL_S = 30.0
KILL_S = 10.0
STACKS_S = 2.0
SUSPENDED_S = 5.0


@dataclass(frozen=True)
class Watch:
    """How long workers and nodes may be silent, and who hears of the group.

    `check_ray` raises where the Ray that the workers run on is lost; `should_resize` says that the generation
    shall stop for one of other workers.
    """

    patience: Patience
    on_event: OnEvent
    on_status: OnStatus
    should_stop: Callable[[], bool]
    check_ray: Callable[[], None]
    should_resize: Callable[[], bool]


class Generation:
    """Runs the workers once, from their start to the end of the last one or the first failure of any."""

    def __init__(
        self, number: int, crew: Sequence[tuple[Node, int]], watch: Watch, ready_kind: Literal["ready", "recovered"]
    ) -> None:
        """`crew` are nodes and their numbers of workers; `ready_kind` is the event to send once all have begun."""
        self.lost: list[Node] = []
        self.noticed = time.monotonic()
        self._number = number
        self._ready_kind = ready_kind
        self._nodes = [node for node, _ in crew]
        self._watch = watch
        self._node_of = [node for node, share in crew for _ in range(share)]
        ends = list(accumulate(share for _, share in crew))
        self._ranks_of = tuple(range(end - share, end) for (_, share), end in zip(crew, ends, strict=True))
        self._states: dict[int, WorkerState] = {}
        self._pause_s = pause_between_answers(len(crew), watch.patience.lease_s)
        self._polls: dict[ray.ObjectRef, Node] = {}
        self._asked: dict[Node, float] = {}
        self._looked = time.monotonic()

    def run(self, laps: Laps) -> int | Fault:
        """The exit code of the group, or why it failed; then all workers are gone, and `lost` names dead nodes.

        `laps` began with the last fault or, in the first generation, with the start; those that this generation needs
        until all are at work go with the event. `noticed` is when it saw its own fault.
        """
        try:
            outcome = self._start() or self._follow(laps)
        except RayLostError:
            raise  # through what is lost, no worker can be ended
        except BaseException:
            self._kill()
            raise
        if isinstance(outcome, int):
            return outcome
        self.noticed = time.monotonic()
        self._kill()
        # Ranks feel the end of a node's connections before Ray knows that the node is gone.
        return self._loss() if self.lost and outcome.traceback and not outcome.is_users_mistake else outcome

    def _start(self) -> Fault | None:
        n_workers = len(self._node_of)
        try:
            port = ray.get(self._nodes[0].call("bind"), timeout=CALL_S)
            host, lease_s = self._nodes[0].host, self._watch.patience.lease_s
            replies = [
                node.call("start", Assignment(self._number, self._ranks_of, i, host, port, lease_s, node.device))
                for i, node in enumerate(self._nodes)
            ]
            pids = [pid for reply in ray.get(replies, timeout=CALL_S) for pid in reply]
            outputs = ray.get([node.call("output") for node in self._nodes], timeout=CALL_S)
        except RayError as error:
            self.lost = [node for node in self._nodes if not self._answers(node)]
            return Fault(f"workers did not start: {error}", node=", ".join(node.host for node in self.lost))
        ranks = [{"rank": rank, "pid": pid, "node": self._node_of[rank].host} for rank, pid in enumerate(pids)]
        self._watch.on_event(
            "start", {"generation": self._number, "workers": n_workers, "ranks": ranks, "output": sorted(set(outputs))}
        )
        for node in self._nodes:
            self._poll(node)
        return None

    def _follow(self, laps: Laps) -> int | Fault:
        n_workers = len(self._node_of)
        laps.lap("forking")
        is_ready = is_stopping = False
        begun: set[int] = set()
        codes: dict[int, int] = {}
        while True:
            news = self._receive(TICK_S)
            self._watch.check_ray()
            if fault := self._find_fault(news):
                return fault
            begun.update(state.rank for state in news if has_begun(state))
            codes.update((state.rank, state.exit_code) for state in news if state.exit_code is not None)
            if not is_ready and len(begun) == n_workers:
                is_ready = True
                laps.split([state.entered for state in self._states.values()])
                times = {"seconds": laps.seconds, "phases": laps.rounded}
                self._watch.on_event(self._ready_kind, {"generation": self._number, **times})
            if len(codes) == n_workers:
                return max(codes.values())
            if not is_stopping and self._watch.should_stop():
                is_stopping = True
                self._watch.on_event("stop", {"generation": self._number})
            elif not is_stopping and is_ready and self._watch.should_resize():
                is_stopping = True
            else:
                continue
            for node in self._nodes:
                node.call("stop")

    def _poll(self, node: Node) -> None:
        self._polls[node.poll(self._pause_s)] = node
        self._asked[node] = time.monotonic()

    def _receive(self, timeout_s: float) -> list[WorkerState]:
        """Takes in the agents' answers: waits for one, then takes all that are there. Returns what they say."""
        # To look costs as much as there are nodes: what comes close together is taken in at once.
        time.sleep(max(0.0, self._looked + GATHER_S - time.monotonic()))
        ray.wait(list(self._polls), timeout=timeout_s)
        looked, self._looked = self._looked, time.monotonic()
        if self._looked - looked > SUSPENDED_S:
            # It was this process that was away: what the nodes have answered meanwhile is still to be read.
            self._asked = dict.fromkeys(self._asked, self._looked)
        ready, _ = ray.wait(list(self._polls), num_returns=len(self._polls), timeout=0)
        news: list[WorkerState] = []
        for poll in ready:
            node = self._polls.pop(poll)
            try:
                states = ray.get(poll)
            except RayError:
                self.lost.append(node)
                continue
            news += states
            for state in states:
                before = self._states.get(state.rank)
                self._states[state.rank] = state
                if state.step is not None and (before is None or before.step != state.step):
                    self._watch.on_status(state.rank, state.step, state.status)
            self._poll(node)
        return news

    def _find_fault(self, news: Sequence[WorkerState]) -> Fault | None:
        """Looks at what is new alone: whatever was there before was no fault."""
        failed = [state for state in news if state.failure]
        if failed and not self.lost and all(state.failure and state.failure.traceback for state in failed):
            # What these ranks raised may be the echo of a death that another agent is about to report.
            time.sleep(SETTLE_S)
            news = [*news, *self._receive(0)]
        self.lost += [node for node, at in self._asked.items() if self._is_overdue(node, at)]
        if self.lost:
            return self._loss()
        failed = [state for state in news if state.failure]
        if failed:
            return self._describe(min(failed, key=_precedence))
        if any(map(self._is_silent, news)):
            for node in self._nodes:
                node.call("output")  # which ends its poll: suspicion compares states of one moment
            time.sleep(SETTLE_S)
            self._receive(0)
            silent = [state for state in self._states.values() if self._is_silent(state)]
            return self._silence(silent) if silent else None
        return None

    def _loss(self) -> Fault:
        lost = ", ".join(node.host for node in self.lost)
        return Fault("the node or its agent was lost", node=lost, ranks=self._doings())

    def _doings(self, stacks: Mapping[int, str] | None = None) -> tuple[dict[str, Any], ...]:
        return doings(self._states.values(), [node.host for node in self._node_of], stacks)

    def _is_overdue(self, node: Node, asked: float) -> bool:
        return node not in self.lost and time.monotonic() - asked > self._watch.patience.with_node

    def _is_silent(self, state: WorkerState) -> bool:
        patience = self._watch.patience
        is_late = state.silent_s > patience.with_worker(state.usual_silence_s, state.longest_silence_s, state.is_long)
        return state.exit_code is None and (is_late or state.suspended_s > patience.with_suspended)

    def _describe(self, state: WorkerState) -> Fault:
        failure = state.failure
        assert failure
        suspect = self._states[failure.suspects[0]] if failure.suspects else state
        return Fault(
            failure.reason,
            traceback=failure.traceback,
            is_users_mistake=failure.is_users_mistake,
            step=state.step,
            suspects=failure.suspects,
            ranks=self._doings(),
            **self._place(suspect),
        )

    def _place(self, state: WorkerState) -> dict[str, Any]:
        node = self._node_of[state.rank]
        return {"rank": state.rank, "pid": state.pid, "node": node.host, "node_id": node.node_id}

    def _silence(self, silent: Sequence[WorkerState]) -> Fault:
        """When one hangs, all fall silent in the next collective: suspect who is not in it, while others are."""
        stacks = self._stacks()
        seen = {rank: stack for rank, stack in stacks.items() if not stack.startswith(UNSEEN)}
        waiting = [rank for rank, stack in seen.items() if waits_for_peers(stack)]
        apart = [self._states[rank] for rank in seen if waiting and rank not in waiting]
        suspended = [state for state in silent if state.suspended_s]
        state = min(suspended or apart or silent, key=_suspicion)
        patience, stack = self._watch.patience, seen.get(state.rank)
        reason = f"silent for {state.silent_s:.1f} s "
        reason += "before its first step" if state.step is None else f"after step {state.step}"
        if state.is_long:
            reason += f" in {state.phase}"
        if state.suspended_s:
            reason += ", its process is suspended"
        else:
            reason += f", {patience.why(state.usual_silence_s, state.longest_silence_s, state.is_long)}"
        if stack:
            reason += f"; it is in {stack.split(' < ')[0]}"
        if waiting and state.rank not in waiting:
            reason += f", while ranks {as_ranges(waiting)} wait for it in a collective"
        return Fault(reason, step=state.step, ranks=self._doings(stacks), **self._place(state))

    def _stacks(self) -> dict[int, str]:
        """Where the workers are, of those that can be seen in time."""
        answers = [node.call("stacks", STACKS_S) for node in self._nodes]
        ready, _ = ray.wait(answers, num_returns=len(answers), timeout=2 * STACKS_S)
        found: dict[int, str] = {}
        for answer in ready:
            with suppress(RayError):
                found |= ray.get(answer)
        return found

    def _kill(self) -> None:
        """Ends all workers; a node that does not confirm it is lost."""
        kills = {node: node.call("kill") for node in self._nodes if node not in self.lost}
        for node, kill in kills.items():
            try:
                ray.get(kill, timeout=KILL_S)
            except RayError:
                self.lost.append(node)

    def _answers(self, node: Node) -> bool:
        try:
            ray.get(node.call("output"), timeout=KILL_S)
        except RayError:
            return False
        return True


def pause_between_answers(n_nodes: int, lease_s: float) -> float:
    """How many seconds an agent without news waits: such that each hears of the driver well within its lease."""
    return min(max(POLL_S, n_nodes / ANSWERS_PER_S), lease_s / 4)


def has_begun(state: WorkerState) -> bool:
    return state.step is not None or state.exit_code is not None


def _precedence(state: WorkerState) -> tuple[bool, float]:
    """The cause before its echoes: a death without a word comes first, then what was raised first."""
    assert state.failure
    return state.failure.traceback is not None, state.failure.time


def _suspicion(state: WorkerState) -> tuple[int, float]:
    """The furthest behind first."""
    return -1 if state.step is None else state.step, -state.silent_s
