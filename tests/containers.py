"""Pods of Kubernetes on this machine, by podman: what `moray submit --to kubernetes` writes runs as it is.

The image is this machine: its programs, its Python and this moray. What is here plays the parts of the Job controller
and of KubeRay's operator, as far as the tests need them; neither is ever to be let loose on a real API server.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

import moray

PACKAGES = "podman runc catatonit netavark aardvark-dns iptables"
# What podman needs where control groups are of both kinds, and limits may not be raised.
CONFIGURATION = """\
[containers]
default_ulimits=["nofile=1024:1024","nproc=1024:1024"]
pids_limit=0
[engine]
runtime="runc"
cgroup_manager="cgroupfs"
[network]
network_backend="netavark"
"""
IMAGE = "localhost/moray-test:latest"
CLAIM = "moray-test"
MOUNT = "/shared"
Pod = dict[str, Any]


@dataclass
class Containers:
    """A network of pods with one storage, which is `storage` here and MOUNT in them."""

    folder: Path
    network: str
    storage: Path
    subnet: int
    pods: list[str] = field(default_factory=list)
    config_maps: set[str] = field(default_factory=set)

    def address(self, number: int) -> str:
        return f"10.{89 + self.subnet // 256}.{self.subnet % 256}.{number}"

    def podman(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"CONTAINERS_CONF": str(self.folder / "containers.conf")}
        return subprocess.run(["podman", *words], env=environment, capture_output=True, text=True, timeout=timeout)

    def start(self, name: str, number: int, pod: Pod, config_map: dict[str, Any]) -> str:
        """Starts the pod of a template's spec at the address of that number; returns its container's name."""
        container = pod["containers"][0] | {"imagePullPolicy": "Never"}
        mounts, volumes = [], []
        for at, path in enumerate(_machine()):
            mounts.append({"name": f"machine-{at}", "mountPath": path})
            volumes.append({"name": f"machine-{at}", "hostPath": {"path": path}})
        container["volumeMounts"] = [*mounts, *container["volumeMounts"]]
        spec = {"restartPolicy": "Never", **pod, "containers": [container], "volumes": [*volumes, *pod["volumes"]]}
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        self.config_maps.add(config_map["metadata"]["name"])
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump_all([config_map, document]))
        self.pods.append(name)
        done = self.podman("kube", "play", "--network", self.network, "--ip", self.address(number), str(path))
        assert done.returncode == 0, done.stderr
        return f"{name}-{container['name']}"

    def remove(self, *names: str) -> None:
        """As it is when a node is lost: at once."""
        if names:
            self.podman("pod", "kill", *names)
            self.podman("pod", "rm", "--force", "--time", "0", *names)
        self.pods = [name for name in self.pods if name not in names]

    def containers(self) -> list[str]:
        """The names of those that were started for pods that are still there."""
        told = self.podman("ps", "--all", "--format", "{{.Names}}").stdout.split()
        return [name for name in told if name.startswith(tuple(self.pods))]

    def are_running(self) -> bool:
        """Whether no container of a pod has ended."""
        return all(
            self.podman("pod", "inspect", "-f", "{{.State}}", pod).stdout.strip() == "Running" for pod in self.pods
        )

    def log(self, container: str) -> str:
        done = self.podman("logs", container)
        return done.stdout + done.stderr

    def exit_code(self, container: str, timeout: float = 100) -> int:
        """Waits for its end."""
        return int(self.podman("wait", container, timeout=timeout).stdout)

    def kill(self, container: str) -> None:
        assert self.podman("kill", "--signal", "KILL", container).returncode == 0

    def ask_to_end(self, container: str, grace_s: int) -> "subprocess.Popen[bytes]":
        environment = os.environ | {"CONTAINERS_CONF": str(self.folder / "containers.conf")}
        words = ["podman", "stop", "--time", str(grace_s), container]
        return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)


@contextmanager
def containers(folder: Path, subnet: int) -> Iterator[Containers]:
    """Each user of it has a subnet of its own. Skips where there is no podman, and says what to install."""
    if missing := [program for program in ("podman", "runc", "iptables") if shutil.which(program) is None]:
        if "CI" in os.environ:
            pytest.fail(f"{', '.join(missing)} missing in CI")
        pytest.skip(f"{', '.join(missing)} missing: apt install {PACKAGES}")
    storage = folder / "storage"
    storage.mkdir()
    # Wherever this moray is imported from here, pods import it from there.
    (folder / "import").mkdir()
    (folder / "import" / "moray").symlink_to(_repository())
    command = folder / "import" / "bin" / "moray"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\nexec python -m moray "$@"\n')
    command.chmod(0o755)
    (folder / "containers.conf").write_text(CONFIGURATION)
    here = Containers(folder, f"moray-test-{os.getpid()}-{subnet}", storage, subnet)
    path = f"/import/bin:{sys.prefix}/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    (folder / "Containerfile").write_text(
        f"FROM scratch\nENV PATH={path} PYTHONPATH=/import HOME=/tmp USER=root CUDA_VISIBLE_DEVICES= "
        "RAY_USAGE_STATS_ENABLED=0\nWORKDIR /tmp\nCOPY import /import\n"
    )
    try:
        for words in (
            ("build", "--quiet", "--tag", IMAGE, "--file", str(folder / "Containerfile"), str(folder)),
            ("network", "create", "--subnet", f"{here.address(0)}/24", here.network),
            ("volume", "create", "-o", "type=none", "-o", "o=bind", "-o", f"device={storage}", CLAIM),
        ):
            done = here.podman(*words)
            if done.returncode:
                pytest.fail(f"podman {words[0]}: {done.stderr}")
        yield here
    finally:
        here.remove(*here.pods)
        here.podman("network", "rm", "--force", here.network)
        # podman keeps a ConfigMap, and an emptyDir, as a volume of its name.
        here.podman("volume", "rm", "--force", CLAIM, "shm", *here.config_maps)


def _repository() -> Path:
    return Path(moray.__file__).resolve().parent


def _machine() -> list[str]:
    """The folders that programs, Python and this moray lie in; none below another."""
    wanted = ["/usr", "/bin", "/sbin", "/lib", "/lib64", sys.prefix, sys.base_prefix, str(_repository())]
    there = [Path(path) for path in dict.fromkeys(wanted) if Path(path).exists()]
    return [str(path) for path in there if not any(other in path.parents for other in there)]
