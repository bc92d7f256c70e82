"""Every kind of fault: what it does to a run, and what must be put right before, or after, the run goes on."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from threading import Timer

from chaos.nodes import RayNode, kill
from chaos.run import EVERY, Run
from moray.parallel.checkpoint.commits import Commit, list_commits

Repair = Callable[[], None]
FULL_S = 8.0
DRAIN = """
import socket, sys, time
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
import ray, os
address = os.environ["RAY_ADDRESS"]
ray.init(address, logging_level="error")
def answers(n):  # Ray believes for a minute in a node that was cut off, whose successor has its address
    try:
        socket.create_connection((n["NodeManagerAddress"], n["NodeManagerPort"]), 2).close()
    except OSError:
        return False
    return True
(node,) = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == sys.argv[1] and answers(n)]
reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
accepted, why = GcsClient(address=address).drain_node(node, reason, "chaos", int(1000 * (time.time() + 60)))
assert accepted, why
"""


@dataclass(frozen=True)
class Fault:
    """`harm` does it and returns what puts right what the run does not mend itself.

    ends: how the driver may end of it; then it is put right, and the same command goes on. Otherwise, or with
    `is_late`, it is put right once all compute again. steps: most that may be computed again. sign: the event that
    shows that it was noticed; "": nothing is to be noticed.
    """

    name: str
    harm: Callable[[Run, Random], Repair | None]
    ends: tuple[int, ...] = ()
    steps: int = EVERY + 2
    sign: str = "fault"
    back: str = "at work"
    is_late: bool = False


def _some_node(run: Run, random: Random) -> RayNode:
    return random.choice(run.nodes.at_work())


def _workers(number: int) -> Callable[[Run, Random], None]:
    def harm(run: Run, random: Random) -> None:
        workers = [pid for node in run.nodes.at_work() for pid in node.workers]
        for pid in random.sample(workers, min(number, len(workers))):
            kill(pid)

    return harm


def _workers_of_a_node(run: Run, random: Random) -> None:
    for pid in _some_node(run, random).workers:
        kill(pid)


def _agent(run: Run, random: Random) -> None:
    agent = _some_node(run, random).agent
    assert agent
    kill(agent)


def _raylet(run: Run, random: Random) -> Repair:
    node = _some_node(run, random)
    for pid in node.named(b"raylet/raylet"):
        kill(pid)
    return lambda: _restart(node)


def _restart(*nodes: RayNode) -> None:
    for node in nodes:
        node.power_off()
    for node in nodes:
        node.start()


def _node(run: Run, random: Random) -> Repair:
    node = _some_node(run, random)
    node.power_off()
    return node.start


def _two_nodes(run: Run, random: Random) -> Repair:
    """Which come back a while later, whether anybody waits for them or not."""
    first = _some_node(run, random)
    second = random.choice([node for node in run.nodes.others if node is not first])
    for node in (first, second):
        node.power_off()
    return_of_one = Timer(5, first.start)
    return_of_one.start()

    def repair() -> None:
        return_of_one.join()
        second.start()

    return repair


def _head(run: Run, random: Random) -> Repair:
    for pid in run.nodes.head.named(b"gcs_server"):
        kill(pid)
    return lambda: _restart(*run.nodes.all)


def _driver(run: Run, random: Random) -> None:
    run.kill_driver()


def _ask_to_stop(number: signal.Signals) -> Callable[[Run, Random], None]:
    def harm(run: Run, random: Random) -> None:
        pid = run.driver_pid
        assert pid
        os.kill(pid, number)

    return harm


def _trap(name: str) -> Callable[[Run, Random], None]:
    def harm(run: Run, random: Random) -> None:
        trap = run.folder / f"trap-{name}"
        trap.touch()
        run.wait_until(lambda: not trap.exists(), f"trap {name}")

    return harm


def _suspended(run: Run, random: Random) -> None:
    kill(random.choice(_some_node(run, random).workers), signal.SIGSTOP)


def _cut_off(run: Run, random: Random) -> Repair:
    node = _some_node(run, random)
    node.network.unplug()
    return lambda: _restart(node)


def _cut_off_without_driver(run: Run, random: Random) -> Repair:
    """The new driver finds a Ray that does not know yet that the node is gone."""
    node = _some_node(run, random)
    node.network.unplug()
    run.kill_driver()
    return lambda: _restart(node)


def _cut_off_for_a_moment(run: Run, random: Random) -> None:
    node = _some_node(run, random)
    node.network.unplug()
    time.sleep(3)
    node.network.plug_in()


def _full_disk(run: Run, random: Random) -> None:
    """The run lies on a small file system of its own. Its log may have no room left to tell of it."""
    filling, failed = run.folder / "filling", _failed_commits(run)
    with filling.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    until = time.monotonic() + FULL_S
    while _failed_commits(run) == failed and time.monotonic() < until:
        time.sleep(0.1)
    filling.unlink()


def _failed_commits(run: Run) -> int:
    return sum(event["kind"] == "commit_failed" for event in run.events())


def _drained(run: Run, random: Random) -> Repair:
    node = _some_node(run, random)
    told = run.nodes.head.run(sys.executable, "-c", DRAIN, node.network.address)
    assert told.returncode == 0, told.stderr
    return lambda: _restart(node)


def _spoil(how: Callable[[Path, Commit, Commit], None]) -> Callable[[Run, Random], None]:
    """A file of the newest commit, which then is the one to resume from, as the driver is killed."""

    def harm(run: Run, random: Random) -> None:
        run.wait_until(lambda: len(list_commits(run.folder / "checkpoints")) > 1, "two commits")
        run.kill_driver()
        run.wait_until(lambda: not any(node.workers for node in run.nodes.others), "workers end")
        older, newest = list_commits(run.folder / "checkpoints")[-2:]
        how(newest.path / random.choice(sorted(newest.manifest.files)), older, newest)

    return harm


def _flip(path: Path, older: Commit, newest: Commit) -> None:
    found = bytearray(path.read_bytes())
    found[len(found) // 2] ^= 1
    path.write_bytes(found)


def _truncate(path: Path, older: Commit, newest: Commit) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _make_stale(path: Path, older: Commit, newest: Commit) -> None:
    """The file of that name, or any, of the commit before."""
    names = sorted(older.manifest.files)
    shutil.copy(older.path / (path.name if path.name in names else names[0]), path)


def _remove(path: Path, older: Commit, newest: Commit) -> None:
    path.unlink()


def _damaged_tar(run: Run, random: Random) -> Repair:
    """A rank that reads the shard anew finds out."""
    tars = sorted(run.data.rglob("*.tar"))
    kept = {tar: tar.read_bytes() for tar in tars}
    for tar, found in kept.items():
        tar.write_bytes(found[:512] + bytes(255 - byte for byte in found[512:-1024]) + found[-1024:])
    _workers(1)(run, random)

    def repair() -> None:
        for tar, found in kept.items():
            tar.write_bytes(found)

    return repair


def _second_driver(run: Run, random: Random) -> None:
    second = run.nodes.begin(*run.command())
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 2, said
    assert "is in use by" in said, said


def _second_driver_without_locks(run: Run, random: Random) -> Repair:
    """It finds other slots than those that the first one has, and takes the run over; then it is asked to stop."""
    alone = {"cluster__launcher": "local", "cluster__workers": 1}
    second = run.nodes.begin(*run.command(without_locks=True, **alone))
    first = run.driver
    assert first
    run.wait_until(lambda: first.poll() is not None, "a takeover")

    def repair() -> None:
        for pid in run.nodes.head.named(b"pretrain\0"):
            kill(pid, signal.SIGTERM)
        said, _ = second.communicate(timeout=60)
        assert second.returncode == 75, said

    return repair


KILLED = (-9, 137)
FAULTS = [
    Fault("SIGKILL of a worker", _workers(1)),
    Fault("SIGKILL of two workers", _workers(2)),
    Fault("SIGKILL of all workers of a node", _workers_of_a_node),
    Fault("SIGKILL of an agent", _agent),
    Fault("SIGKILL of a raylet", _raylet),
    Fault("SIGKILL of the GCS", _head, ends=(1,)),
    Fault("SIGKILL of the driver", _driver, ends=KILLED, sign=""),
    Fault("SIGTERM to the driver", _ask_to_stop(signal.SIGTERM), ends=(75,), steps=0, sign="stop"),
    Fault("SIGUSR1 to the driver", _ask_to_stop(signal.SIGUSR1), ends=(75,), steps=0, sign="stop"),
    Fault("death while writing a shard", _trap("shard")),
    Fault("death while writing the manifest", _trap("manifest")),
    Fault("death before the rename", _trap("rename")),
    Fault("death after the rename", _trap("renamed")),
    Fault("death while writing a snapshot", _trap("snapshot")),
    Fault("SIGSTOP of a worker", _suspended),
    Fault("a lost node", _node),
    Fault("two lost nodes", _two_nodes),
    Fault("a node cut off from the network", _cut_off),
    Fault("a node cut off, and SIGKILL of the driver", _cut_off_without_driver, ends=KILLED, sign="", is_late=True),
    Fault("a network that fails for 3 s", _cut_off_for_a_moment, sign="", back="a step"),
    Fault("a drained node", _drained, sign="leaving"),
    Fault("a full disk", _full_disk, sign="", steps=0, back="a commit"),
    Fault("a flipped bit in the newest commit", _spoil(_flip), ends=KILLED, steps=2 * EVERY + 2, sign=""),
    Fault("a missing file in the newest commit", _spoil(_remove), ends=KILLED, steps=2 * EVERY + 2, sign=""),
    Fault("a truncated file in the newest commit", _spoil(_truncate), ends=KILLED, steps=2 * EVERY + 2, sign=""),
    Fault("a stale file in the newest commit", _spoil(_make_stale), ends=KILLED, steps=2 * EVERY + 2, sign=""),
    Fault("a damaged tar", _damaged_tar, ends=(2,)),
    Fault("a NaN in a gradient", _trap("nan")),
    Fault("a second driver", _second_driver, sign="", steps=0, back="a step"),
    Fault("a second driver, without locks", _second_driver_without_locks, ends=(76,), sign="", steps=2 * EVERY + 2),
]
