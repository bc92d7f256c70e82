"""An agent and its workers without Ray: how they begin, and how they end."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from counting import Plan, beat, count, end_silently, history, leave_a_helper, look_once

from moray.cluster.ray.agent import AgentProcess
from moray.cluster.ray.generation import pause_between_answers
from moray.cluster.ray.messages import Assignment, WorkerState
from moray.cluster.ray.stacks import stacks as look
from moray.cluster.ray.stacks import waits_for_peers

HOST, LEASE_S = "127.0.0.1", 60.0


@contextmanager
def agent_for(function: Any, argument: Any) -> Iterator[AgentProcess]:
    agent = AgentProcess(sys.path)
    try:
        agent.call("load", pickle.dumps((function, argument)), HOST)
        yield agent
    finally:
        agent.close()


def poll_until_ended(agent: AgentProcess) -> list[WorkerState]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        states: list[WorkerState] = agent.call("poll")
        if all(state.exit_code is not None or state.failure for state in states):
            return states
    raise AssertionError(f"the workers have not ended: {states}")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def is_gone_soon(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def test_workers_of_one_agent_count_twice(tmp_path: Path) -> None:
    with agent_for(count, Plan(str(tmp_path), 3)) as agent:
        for generation in (1, 2):
            port = agent.call("bind")
            pids = agent.call("start", Assignment(generation, (range(3),), 0, HOST, port, LEASE_S, "cpu"))
            states = poll_until_ended(agent)
            assert [(state.rank, state.exit_code) for state in states] == [(0, 0), (1, 0), (2, 0)]
            assert [state.pid for state in states] == pids
            (tmp_path / "steps").unlink()


def test_what_one_generation_finds_out_the_next_knows(tmp_path: Path) -> None:
    with agent_for(look_once, str(tmp_path / "looks")) as agent:
        for generation in (1, 2, 3):
            agent.call("start", Assignment(generation, (range(1),), 0, HOST, agent.call("bind"), LEASE_S, "cpu"))
            assert [state.exit_code for state in poll_until_ended(agent)] == [1]
    assert (tmp_path / "looks").read_text() == "looked in 1\n"


def test_two_agents_make_one_group(tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), 3)
    with agent_for(count, plan) as first, agent_for(count, plan) as second:
        port = first.call("bind")
        # The second node is faster: its ranks wait at the port that is already bound.
        second.call("start", Assignment(1, (range(2), range(2, 3)), 1, HOST, port, LEASE_S, "cpu"))
        first.call("start", Assignment(1, (range(2), range(2, 3)), 0, HOST, port, LEASE_S, "cpu"))
        states = poll_until_ended(first) + poll_until_ended(second)
    assert [(state.rank, state.exit_code) for state in states] == [(0, 0), (1, 0), (2, 0)]
    assert sorted(path.name for path in tmp_path.glob("rank-*")) == [f"rank-{rank}-of-3" for rank in range(3)]


def test_a_stop_reaches_workers_that_were_forked_just_now(tmp_path: Path) -> None:
    with agent_for(count, Plan(str(tmp_path), 100000)) as agent:
        for generation in (1, 2, 3):
            agent.call("start", Assignment(generation, (range(2),), 0, HOST, agent.call("bind"), LEASE_S, "cpu"))
            agent.call("stop")
            assert [state.exit_code for state in poll_until_ended(agent)] == [75, 75]


def test_a_death_without_a_word_is_a_failure() -> None:
    with agent_for(end_silently, None) as agent:
        agent.call("start", Assignment(1, (range(1),), 0, HOST, agent.call("bind"), LEASE_S, "cpu"))
        (state,) = poll_until_ended(agent)
        assert state.failure
        assert state.failure.reason == "exited with code 3 without a word"
        assert state.failure.traceback is None


def test_a_workers_helpers_end_with_it(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with agent_for(leave_a_helper, str(path)) as agent:
        agent.call("start", Assignment(1, (range(1),), 0, HOST, agent.call("bind"), LEASE_S, "cpu"))
        (state,) = poll_until_ended(agent)
        assert state.exit_code == 0
        assert is_gone_soon(int(path.read_text()), within_s=10)


def test_a_worker_does_not_wait_for_a_driver_that_does_not_ask() -> None:
    """20,000 heartbeats are more than any pipe holds."""
    with agent_for(beat, 20_000) as agent:
        (pid,) = agent.call("start", Assignment(1, (range(1),), 0, HOST, agent.call("bind"), LEASE_S, "cpu"))
        assert is_gone_soon(pid, within_s=30)
        (state,) = poll_until_ended(agent)
        assert (state.step, state.exit_code) == (19_999, 0)


def test_workers_end_with_their_lease_and_say_why(tmp_path: Path) -> None:
    with agent_for(count, Plan(str(tmp_path), 100000, 0.01)) as agent:
        pids = agent.call("start", Assignment(1, (range(2),), 0, HOST, agent.call("bind"), 2.0, "cpu"))
        until = time.monotonic() + 4
        while time.monotonic() < until:  # as long as it is asked, the lease goes on
            assert not any(state.failure for state in agent.call("poll"))
        assert all(is_gone_soon(pid, within_s=4) for pid in pids)
        states = agent.call("poll")
        words = "the driver was silent for 2 s: its lease of cluster.lease_timeout_s=2 ended"
        assert [state.failure and state.failure.reason for state in states] == [words] * 2
        steps = len(history(tmp_path))
        agent.call("start", Assignment(2, (range(2),), 0, HOST, agent.call("bind"), 2.0, "cpu"))
        while len(history(tmp_path)) < steps + 5:
            assert not any(state.failure for state in agent.call("poll"))


def test_an_agent_without_workers_has_nothing_to_end(tmp_path: Path) -> None:
    with agent_for(count, Plan(str(tmp_path), 3)) as agent:
        for generation in (1, 2):
            agent.call("start", Assignment(generation, (range(1),), 0, HOST, agent.call("bind"), 1.0, "cpu"))
            (state,) = poll_until_ended(agent)
            assert state.exit_code == 0
            time.sleep(1.5)
            (state,) = agent.call("poll")
            assert (state.exit_code, state.failure) == (0, None)


def test_a_poll_ends_with_news_or_another_call(tmp_path: Path) -> None:
    """However long an agent of a large cluster may wait: pytest's limit would come first."""
    with agent_for(count, Plan(str(tmp_path), 100_000, 0.01)) as agent, ThreadPoolExecutor(1) as thread:
        (pid,) = agent.call("start", Assignment(1, (range(1),), 0, HOST, agent.call("bind"), LEASE_S, "cpu"))
        assert agent.call("poll", 1000.0)[0].step is not None, "the first step is news"
        poll = thread.submit(agent.call, "poll", 1000.0)
        assert agent.call("output")
        assert poll.result()[0].failure is None
        poll = thread.submit(agent.call, "poll", 1000.0)
        os.kill(pid, signal.SIGKILL)
        assert poll.result()[0].failure


@pytest.mark.parametrize(
    ("n_nodes", "lease_s", "pause_s"),
    [(1, 20.0, 0.2), (10, 20.0, 0.2), (200, 20.0, 4.0), (9000, 20.0, 5.0), (1, 0.4, 0.1)],
)
def test_more_nodes_answer_less_often(n_nodes: int, lease_s: float, pause_s: float) -> None:
    assert pause_between_answers(n_nodes, lease_s) == pytest.approx(pause_s)


def test_steps_are_measured_once_one_has_been_seen_whole(tmp_path: Path) -> None:
    with agent_for(count, Plan(str(tmp_path), 4, 1.5)) as agent:  # a step that a busy machine does not overlook
        agent.call("start", Assignment(1, (range(1),), 0, HOST, agent.call("bind"), LEASE_S, "cpu"))
        longest: dict[int | None, float | None] = {}
        while (state := agent.call("poll")[0]).exit_code is None:
            longest[state.step] = state.longest_silence_s
        assert longest[1] is None
        assert longest[2] is not None
        assert 1.5 <= longest[2] < 10


def test_workers_are_seen_from_outside_even_suspended(tmp_path: Path) -> None:
    with agent_for(count, Plan(str(tmp_path), 100000, 1000.0)) as agent:
        pids = agent.call("start", Assignment(1, (range(2),), 0, HOST, agent.call("bind"), LEASE_S, "cpu"))
        while any(state.step is None for state in agent.call("poll")):
            pass
        in_count = re.compile(r"count \(.*counting\.py:\d+\) < work \(\S*/cluster/ray/child\.py")
        while not all(map(in_count.match, agent.call("stacks", 5.0).values())):
            pass  # until both are asleep
        os.kill(pids[1], signal.SIGSTOP)
        stacks = agent.call("stacks", 5.0)
        assert sorted(stacks) == [0, 1]
        assert all(map(in_count.match, stacks.values()))
        polled = time.monotonic()
        first = agent.call("poll")[1].suspended_s
        time.sleep(0.5)
        suspended = [state.suspended_s for state in agent.call("poll")]
        assert suspended[0] == 0.0
        assert first + 0.4 < suspended[1] <= first + time.monotonic() - polled


def test_a_collective_is_told_from_what_is_wrapped_around_a_model() -> None:
    for waits, stack in (
        (True, "all_reduce (torch/distributed/distributed_c10d.py:1) < wrapper (torch/distributed/c10d_logger.py:8)"),
        (
            True,
            "__call__ (torch/_ops.py:1) < wait_tensor (torch/distributed/_functional_collectives.py:2) < f (a.py:3)",
        ),
        (False, "sleep (a.py:1) < g (a.py:2) < f (a.py:3) < wrapped (torch/distributed/fsdp/_fully_shard.py:4)"),
    ):
        assert waits_for_peers(stack) == waits


def test_what_cannot_be_seen_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = subprocess.Popen(["sleep", "1000"])
    try:
        assert look({3: sleeper.pid}, 5.0)[3].startswith("no stack: Error: ")
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        assert look({3: sleeper.pid}, 5.0) == {3: "no stack: [Errno 2] No such file or directory: '/nowhere/py-spy'"}
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_function_the_agent_cannot_import_is_named() -> None:
    task = pickle.dumps(count).replace(b"counting", b"countess")
    agent = AgentProcess(sys.path)
    with pytest.raises(RuntimeError, match="No module named 'countess'"):
        agent.call("load", task, HOST)
    agent.close()


def test_workers_do_not_outlive_the_agents_owner(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(tmp_path)]
    owner = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_alive(pid) for pid in pids)
    finally:
        owner.kill()
        owner.wait()
    assert all(is_gone_soon(pid, within_s=10) for pid in pids)


if __name__ == "__main__":
    with agent_for(count, Plan(sys.argv[1], 100000, 0.01)) as agent:
        print(*agent.call("start", Assignment(1, (range(2),), 0, HOST, agent.call("bind"), LEASE_S, "cpu")), flush=True)
        time.sleep(1000)
