"""What RAY_ADDRESS may be, asked of real clusters: one that `ray start` made, local Rays, and none at all."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from processes import marked_processes
from ray.core.generated.gcs_service_pb2 import GetClusterIdReply
from ray.core.generated.gcs_service_pb2_grpc import (
    NodeInfoGcsServiceServicer,
    add_NodeInfoGcsServiceServicer_to_server,
)

import moray.cluster.ray.address
from moray import UserError
from moray.cluster.ray.address import find_address, is_open


@pytest.fixture
def started() -> Iterator[tuple[str, str]]:
    """The folder and the address of a cluster of one node, made by `ray start`."""
    folder, mark = tempfile.mkdtemp(prefix="r", dir="/tmp"), uuid.uuid4().hex
    port, client_port = free_ports(2)
    command = [
        *("ray", "start", "--head", f"--port={port}", f"--ray-client-server-port={client_port}", "--num-cpus=1"),
        *("--include-dashboard=false", "--disable-usage-stats"),
    ]
    environment = os.environ | {
        "RAY_TMPDIR": folder,
        "MARK": mark,
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    try:
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
        yield folder, (Path(folder) / "ray" / "ray_current_cluster").read_text()
    finally:
        end(mark)
        shutil.rmtree(folder)


def free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(n)]


def end(mark: str) -> None:
    while pids := marked_processes(mark):
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "head", "head:", ":6379"])
def test_what_is_no_address_of_a_head(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"^RAY_ADDRESS={re.escape(address)} must be HOST:PORT of the head node"):
        find_address()


def test_nothing_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.setattr(moray.cluster.ray.address, "ANSWER_S", 0.5)
    with pytest.raises(UserError, match=rf"^RAY_ADDRESS=127.0.0.1:{port}: no Ray answers there within 0.5 s"):
        find_address()


def test_something_else_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(moray.cluster.ray.address, "ANSWER_S", 0.5)
        with pytest.raises(UserError, match=rf"^RAY_ADDRESS={address}: no Ray answers there within 0.5 s"):
            find_address()


@pytest.mark.parametrize("token", [None, "", 64 * "0"], ids=["no mode", "no token", "another token"])
def test_a_cluster_with_another_token(ray_cluster: str, token: str | None, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"RAY_ADDRESS": ray_cluster, "HOME": str(tmp_path)}
    if token is not None:
        environment |= {"RAY_AUTH_MODE": "token"} | ({"RAY_AUTH_TOKEN": token} if token else {})
    script = "from moray.cluster.ray.connection import connected\nwith connected(1): pass"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == (
        f"moray.UserError: RAY_ADDRESS={ray_cluster}: its Ray wants another token; "
        "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as they are on the cluster"
    )
    assert "rpc_client" not in done.stderr


def test_whether_a_ray_asks_for_a_token(ray_cluster: str) -> None:
    """Of one that does not, the smallest part that is asked stands in: its GCS, as ray start would run it."""
    assert not is_open(ray_cluster)
    assert not is_open(f"127.0.0.1:{free_ports(1)[0]}")
    server = grpc.server(ThreadPoolExecutor(1))
    add_NodeInfoGcsServiceServicer_to_server(AnswersAnybody(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert is_open(f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()


class AnswersAnybody(NodeInfoGcsServiceServicer):
    def GetClusterId(self, request: object, context: object) -> GetClusterIdReply:  # noqa: N802 - gRPC's name
        return GetClusterIdReply()


def test_other_drivers_local_rays_are_no_cluster(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    assert find_address() is None
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert find_address() is None
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(UserError, match=r"^RAY_ADDRESS=auto, but no Ray cluster runs on this machine"):
        find_address()


def test_a_cluster_on_this_machine_is_not_passed_over(
    started: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = started
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=rf"a Ray cluster runs on this machine: set RAY_ADDRESS={address} to use it"):
        find_address()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert find_address() == address
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert find_address() is None


def test_the_trace_of_a_cluster_that_is_gone_misleads_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert find_address() is None
