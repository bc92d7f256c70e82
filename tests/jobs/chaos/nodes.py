"""A Ray of several nodes on this machine, any process of which can be found and killed."""

import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from nodes_of_one import SmallNode, small_nodes

PORT = 6379
START_S = 60.0
TRIES = 3
AGENT = b"moray.cluster.ray.agent"
# The first process of a node: it lives as long as the node, and collects what others leave.
INIT = "import signal, time; signal.signal(signal.SIGCHLD, signal.SIG_IGN); [time.sleep(1e6) for _ in iter(int, 1)]"


@dataclass
class RayNode:
    """One of them: `slots` for workers, and Ray's head if it is the first."""

    network: SmallNode
    slots: int
    head: "RayNode | None"
    environment: dict[str, str]
    log: Path
    _machine: subprocess.Popen[bytes] | None = None

    def inside(self, *words: str) -> list[str]:
        return ["nsenter", "--target", str(self._init), "--net", "--mount", "--uts", "--pid", *words]

    def start(self) -> None:
        """The machine, and Ray on it. What starts while others work may take longer than Ray allows for."""
        self.power_on()
        address = self.network.address
        where = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        if self.head:
            where = [f"--address={self.head.network.address}:{PORT}"]
        ray = Path(sysconfig.get_path("scripts"), "ray")
        command = [str(ray), "start", *where, f"--node-ip-address={address}", f"--num-cpus={self.slots}"]
        for _ in range(TRIES):
            process = self.run(*command, "--disable-usage-stats")
            if process.returncode == 0:
                return
            self.power_off()
            self.power_on()
        raise AssertionError(f"Ray does not start on {self.network.name}: {process.stdout}{process.stderr}")

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = self.inside(*words)
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=START_S)

    def power_on(self) -> None:
        with self.log.open("ab") as log:
            command = self.network.command(sys.executable, "-c", INIT)
            self._machine = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        until = time.monotonic() + START_S
        # It has changed its mounts once it runs what it is to run.
        while INIT.encode() not in _cmdline(self._init):
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.01)

    def power_off(self) -> None:
        """All that runs on it is killed at once."""
        if self._machine:
            self._machine.kill()
            self._machine.wait()
            self._machine = None
            self.network.plug_in()

    @property
    def _init(self) -> int:
        """Its first process, as the machine around it numbers it."""
        assert self._machine
        pid = self._machine.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else 0

    @property
    def is_on(self) -> bool:
        return self._machine is not None

    def processes(self) -> dict[int, bytes]:
        """All on it but the first, with their command lines."""
        if not self._machine:
            return {}
        init = self._init
        mine, found = os.readlink(f"/proc/{init}/ns/pid"), {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                pid, is_mine = int(folder.name), os.readlink(folder / "ns" / "pid") == mine
                if is_mine and pid != init and (cmdline := _cmdline(pid)):
                    found[pid] = cmdline
        return found

    def named(self, name: bytes) -> list[int]:
        return [pid for pid, cmdline in self.processes().items() if name in cmdline]

    @property
    def workers(self) -> list[int]:
        """Workers are forks of their agent."""
        agents = set(self.named(AGENT))
        return sorted(pid for pid in agents if _parent(pid) in agents)

    @property
    def agent(self) -> int | None:
        agents = set(self.named(AGENT))
        return next((pid for pid in agents if _parent(pid) not in agents), None)


@dataclass
class Nodes:
    """The head, without slots, and the others."""

    head: RayNode
    others: list[RayNode]
    environment: dict[str, str]
    begun: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def all(self) -> list[RayNode]:
        return [self.head, *self.others]

    def start(self) -> None:
        for node in self.all:
            if not node.is_on:
                node.start()

    def begin(self, *words: str, **changed: str) -> subprocess.Popen[str]:
        """A program on the head."""
        process = subprocess.Popen(
            self.head.inside(*words),
            env=self.environment | changed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.begun.append(process)
        return process

    def at_work(self) -> list[RayNode]:
        return [node for node in self.others if node.is_on and node.workers]

    def power_off(self) -> None:
        for node in self.all:
            node.power_off()

    def close(self) -> None:
        self.power_off()
        for process in self.begun:
            process.kill()
            process.wait()


@contextmanager
def ray_of(folder: Path, slots: list[int]) -> Iterator[Nodes]:
    """A head without slots, and a node for each of these numbers of slots; all are on."""
    address = ""
    with small_nodes(folder, 1 + len(slots)) as (first, *rest):
        address = f"{first.address}:{PORT}"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": address,
            "CUDA_VISIBLE_DEVICES": "",
        }
        head = RayNode(first, 0, None, environment, folder / "n1.log")
        others = [
            RayNode(network, n, head, environment, folder / f"{network.name}.log")
            for network, n in zip(rest, slots, strict=True)
        ]
        nodes = Nodes(head, others, environment)
        try:
            nodes.start()
            yield nodes
        finally:
            nodes.close()


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _cmdline(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0
