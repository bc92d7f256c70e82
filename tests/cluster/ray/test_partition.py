"""A driver on one node, its workers on another, and the cable between them pulled."""

import os
import secrets
import subprocess
import sys
import sysconfig
import time
import uuid
from pathlib import Path

import pytest
from counting import history, marked_processes
from nodes_of_one import two_nodes

from moray.cluster.events import read_events

LEASE_S = 4.0
DRIVER = Path(__file__).parent.parent / "counting.py"


def workers(mark: str) -> list[int]:
    """Agents and the workers that they forked: of one agent with two workers, three."""
    return [
        pid for pid in marked_processes(mark) if b"moray.cluster.ray.agent" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


@pytest.mark.timeout(110)
def test_workers_that_are_cut_off_end_with_their_lease_before_others_start(tmp_path: Path) -> None:
    """Ray itself gives them a minute, in which they would train and commit beside their successors."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, "MARK": mark, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray = Path(sysconfig.get_path("scripts"), "ray")
    with two_nodes(tmp_path) as (near, far):
        address = f"{near.address}:6379"
        environment["RAY_ADDRESS"] = address
        start = f"{ray} start --num-cpus=$0 --disable-usage-stats"
        head = f"{start} --head --port=6379 --node-ip-address={near.address} --include-dashboard=false"
        driver = f"exec {sys.executable} {DRIVER} ray 2 {tmp_path} 100000 0.02 {LEASE_S}"
        member = f"until {start} --address={address} --node-ip-address={far.address} --block; do sleep 1; done"
        commands = [near.command("bash", "-c", f"{head} && {driver}", "0"), far.command("bash", "-c", member, "2")]
        log = (tmp_path / "log").open("w")
        processes = [subprocess.Popen(each, env=environment, stdout=log, stderr=log) for each in commands]
        try:
            while len(history(tmp_path)) < 10:
                assert all(process.poll() is None for process in processes), (tmp_path / "log").read_text()
                time.sleep(0.1)
            assert len(workers(mark)) == 3
            near.unplug()
            time.sleep(LEASE_S + 2)
            assert len(workers(mark)) == 1, "the agent alone"
            done = len(history(tmp_path))
            time.sleep(LEASE_S)
            assert len(history(tmp_path)) == done
            kinds = [event["kind"] for event in read_events(tmp_path / "events.jsonl")]
            assert kinds[-2:] == ["fault", "wait"], "the driver has given the node up, and waits for another"
            near.plug_in()
            while len(history(tmp_path)) < done + 10:
                assert all(process.poll() is None for process in processes), (tmp_path / "log").read_text()
                time.sleep(0.1)
            steps = [step for step, _ in history(tmp_path)]
            assert steps == list(range(1, len(steps) + 1))
        finally:
            for process in processes:
                process.kill()
                process.wait()
