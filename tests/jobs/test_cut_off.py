"""A driver on one node, its workers on another, and the cable between them pulled: nobody else there, then a rival."""

import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from nodes_of_one import SmallNode, two_nodes
from processes import marked_processes
from tiny import tiny
from without_locks import WITHOUT_LOCKS, assert_one_chain

from moray.cluster.events import read_events
from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.training.metrics import read_metrics

LEASE_S = 4.0
PORT = 6379


class Nodes:
    """The driver's node, where Ray's head is, and the workers' node; what runs there writes to files in `folder`."""

    def __init__(self, folder: Path, near: SmallNode, far: SmallNode) -> None:
        self.folder, self.near, self.far = folder, near, far
        self.mark = uuid.uuid4().hex
        self.started: list[subprocess.Popen[bytes]] = []
        self._environment = {
            **os.environ,
            "MARK": self.mark,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": f"{near.address}:{PORT}",
        }

    def start(self, node: SmallNode, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"log-{len(self.started)}").open("w") as log:
            process = subprocess.Popen(node.command(*words), env=self._environment, stdout=log, stderr=log)
        self.started.append(process)
        return process

    def said(self, process: subprocess.Popen[bytes]) -> str:
        return (self.folder / f"log-{self.started.index(process)}").read_text()

    def agents_and_workers(self) -> int:
        """Workers are forks of their agent: of one with two, three."""
        agent = b"moray.cluster.ray.agent"
        return sum(agent in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in marked_processes(self.mark))

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()


@pytest.mark.timeout(120)
def test_of_a_driver_that_was_cut_off_and_a_second_attempt_one_trains(dataset: Path, tmp_path: Path) -> None:
    """Ray itself leaves workers that are cut off a minute, in which they would commit beside their successors."""
    run = tmp_path / "run"
    ray = Path(sysconfig.get_path("scripts"), "ray")
    start_ray = f"{ray} start --num-cpus=$0 --disable-usage-stats"
    endless = {"train__steps": 100_000, "train__eval_every": 0, "checkpoint__every": 5, "checkpoint__keep": 60}
    on_ray = {"cluster__launcher": "ray", "cluster__workers": 2, "cluster__lease_timeout_s": LEASE_S}
    pretrain = (sys.executable, "-c", WITHOUT_LOCKS, "pretrain")

    def rows() -> int:
        assert_one_chain(run)
        return len(read_metrics(run))

    def wait_until(holds: Callable[[], bool], *processes: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + 60
        while not holds():
            for process in processes:
                assert process.poll() is None, nodes.said(process)
            assert time.monotonic() < until
            time.sleep(0.1)

    with two_nodes(tmp_path) as (near, far):
        nodes = Nodes(tmp_path, near, far)
        try:
            head = f"{start_ray} --head --port={PORT} --node-ip-address={near.address} --include-dashboard=false"
            settings = tiny(dataset, run, **endless, **on_ray)
            first = nodes.start(near, "bash", "-c", f'{head} && exec "$@"', "0", *pretrain, *settings)
            member = f"{start_ray} --address={near.address}:{PORT} --node-ip-address={far.address} --block"
            nodes.start(far, "bash", "-c", f"until {member}; do sleep 1; done", "2")
            wait_until(lambda: rows() >= 10, *nodes.started)
            assert nodes.agents_and_workers() == 3

            near.unplug()
            wait_until(lambda: nodes.agents_and_workers() == 1, first)
            done = rows()
            wait_until(lambda: [event["kind"] for event in read_events(run / "events.jsonl")][-2:] == ["fault", "wait"])
            assert rows() == done
            near.plug_in()
            wait_until(lambda: rows() >= done + 10, *nodes.started)

            near.unplug()
            second = nodes.start(far, *pretrain, *tiny(dataset, run, **endless))
            first.wait(timeout=30)
            last = nodes.said(first).splitlines()[-1]
            assert first.returncode == 76, nodes.said(first)
            assert last.startswith("generation 2 was taken over by generation 3 (pid ")
            assert " on n2, since " in last
            assert last.endswith("this one has written nothing since, and ends")
            wait_until(lambda: rows() >= done + 30, second)
            assert nodes.agents_and_workers() <= 1, "the agent alone"
            for pid in marked_processes(nodes.mark):
                if b"--cluster.launcher\0local\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGTERM)
            second.wait(timeout=30)
            assert second.returncode == 75, nodes.said(second)
        finally:
            nodes.close()
    assert_one_chain(run)
    assert ledger_problems(run) == []
    found = read_metrics(run)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    assert {row["generation"] for row in found} == {1, 2, 3}
