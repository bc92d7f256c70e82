"""Nodes on one machine: each has a network, a name, a hosts file and process ids of its own (Linux, root)."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

INSIDE = """
hostname "$0" && mount --bind "$1" /etc/hosts && ip link set lo up && mkdir -p /tmp/ray || exit
mount -t tmpfs tmpfs /tmp/ray && mount -t tmpfs tmpfs /dev/shm || exit
shift
exec "$@"
"""

# For Python: how many nodes the Ray with this job server has. `ray list nodes` would import Ray each time.
COUNT_NODES = """
import json, os, sys
from urllib.request import Request, urlopen
token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
told = json.load(urlopen(Request(f"{sys.argv[1]}/api/v0/nodes", headers=token), timeout=5))
print(sum(node["state"] == "ALIVE" for node in told["data"]["result"]["result"]))
"""


@dataclass(frozen=True)
class SmallNode:
    """`command(...)` runs a program on it; when that process is killed, all that runs there is."""

    name: str
    address: str
    namespace: str
    hosts: Path

    def command(self, *words: str) -> list[str]:
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount", "--pid", "--fork"]
        return [*enter, "--kill-child", "--mount-proc", "bash", "-c", INSIDE, self.name, str(self.hosts), *words]

    def beside(self, *words: str) -> list[str]:
        """Runs a program on this node's network, with the name and the files of the machine that all nodes share."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *words]

    def unplug(self) -> None:
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    def plug_in(self) -> None:
        _ip("-n", self.namespace, "link", "set", "eth0", "up")


@contextmanager
def small_nodes(folder: Path, number: int) -> Iterator[list[SmallNode]]:
    """n1, n2, …, joined by cables; each finds its own name at 127.0.1.1, as Debian's installer writes it."""
    names, nodes = [f"n{i + 1}" for i in range(number)], []
    for name in names:
        hosts = folder / f"hosts-{name}"
        others = "".join(f"{_address(other)} {other}\n" for other in names if other != name)
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
        nodes.append(SmallNode(name, _address(name), f"moray-{os.getpid()}-{name}", hosts))
    first, *rest = nodes
    try:
        try:
            for node in nodes:
                _ip("netns", "add", node.namespace)
            # Where all cables meet is in the first node: a bridge that is its own interface, too.
            _ip("-n", first.namespace, "link", "add", "eth0", "type", "bridge")
            for node in rest:
                socket = ["type", "veth", "peer", "name", node.name, "netns", first.namespace]
                _ip("link", "add", "eth0", "netns", node.namespace, *socket)
                _ip("-n", first.namespace, "link", "set", node.name, "master", "eth0", "up")
            for node in nodes:
                _ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", "eth0")
                _ip("-n", node.namespace, "link", "set", "eth0", "up")
            subprocess.run(first.command("true"), check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no namespaces can be made here: {error}")
        yield nodes
    finally:
        for node in nodes:
            subprocess.run(["ip", "netns", "delete", node.namespace], capture_output=True)


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[SmallNode, SmallNode]]:
    with small_nodes(folder, 2) as (first, second):
        yield first, second


def _address(name: str) -> str:
    return f"10.78.0.{name[1:]}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
