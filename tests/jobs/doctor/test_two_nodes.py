"""`moray doctor --cluster` on two real nodes, one of which has another disk and a name that means itself."""

import json
import os
import secrets
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from nodes_of_one import two_nodes

PORT = 6379
WAIT_FOR_BOTH = """
import logging, ray, time
ray.init(log_to_driver=False, logging_level=logging.ERROR)
while sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.2)
"""


@pytest.mark.timeout(120)
def test_what_is_wrong_on_one_node_is_found(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (tmp_path / "wait.py").write_text(WAIT_FOR_BOTH)
    ray = Path(sysconfig.get_path("scripts"), "ray")
    start = f"{ray} start --num-cpus=1 --disable-usage-stats"
    with two_nodes(tmp_path) as (near, far):
        near.hosts.write_text(f"127.0.0.1 localhost\n{near.address} n1\n{far.address} n2\n")
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": f"{near.address}:{PORT}",
        }
        head = f"{start} --head --port={PORT} --node-ip-address={near.address} --include-dashboard=false"
        doctor = f"exec {sys.executable} -m moray doctor --cluster --json --run-dir {run} --data-path {dataset}"
        member = f"{start} --address={near.address}:{PORT} --node-ip-address={far.address} --block"
        other_disk = (
            f"mount -t tmpfs tmpfs {run.parent}; until : < /dev/tcp/{near.address}/{PORT}; do sleep 0.2; done; {member}"
        )
        with (tmp_path / "log").open("w") as log:
            there = subprocess.Popen(far.command("bash", "-c", other_disk), env=environment, stdout=log, stderr=log)
            try:
                here = near.command(
                    "bash", "-c", f"{{ {head} && {sys.executable} {tmp_path}/wait.py; }} >&2 && {doctor}"
                )
                done = subprocess.run(here, env=environment, capture_output=True, text=True, timeout=100)
            finally:
                there.kill()
                there.wait()
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert {node["host"] for node in report["nodes"]} == {"n1", "n2"}
    said = {verdict["check"]: verdict for verdict in report["verdicts"]}
    assert [check for check, verdict in said.items() if verdict["level"] == "bad"] == ["run.dir"]
    assert [said[check]["level"] for check in ("cluster", "versions", "data.path", "clocks", "network")] == ["ok"] * 5
    assert f"run.dir={run}: not there on n2; mount the same storage" in said["run.dir"]["says"]
    assert said["host name"]["level"] == "note"
    assert said["host name"]["says"].startswith("n2: its own name means 127.0.1.1")
    assert said["cluster"]["says"].endswith("Ray asks for a token")
    assert "a pair" in said["network"]["says"]
    assert run.is_dir(), "it was there before"
    assert not [*run.iterdir()]
