"""Every verdict, from the facts of three nodes that are well but for one thing."""

from collections.abc import Callable
from typing import Any

import pytest

from moray.cluster.nvml import Gpu, GpuProcess, Reading
from moray.jobs.doctor.facts import Facts, FolderFacts, Meeting
from moray.jobs.doctor.judge import Cluster, judge

GIB = 2**30
FOLDERS = {"run.dir": "/shared/run", "data.path": "/shared/data"}
RAY = Cluster(address="10.0.0.1:6379")


def healthy(rank: int) -> Facts:
    peers = [peer for peer in range(3) if peer != rank]
    return Facts(
        host=f"n{rank}",
        versions={"python": "3.12.1", "torch": "2.13.0", "moray": "0.1 (source 12345678)", "ray": "2.60.0"},
        has_token=True,
        name_means=f"10.0.0.{rank + 1}",
        open_files=65536,
        shared_memory_bytes=8 * GIB,
        folders={
            "run.dir": FolderFacts(is_there=True, is_writable=True, has_locks=True, free_bytes=900 * GIB),
            "data.path": FolderFacts(is_there=True, problem="Read-only file system", index="abcd"),
        },
        gpus=tuple(gpu(index) for index in range(2)),
        gpu_problem=None,
        device="cuda",
        peak_flops=700e12,
        meeting=Meeting(
            unseen={"run.dir": [], "data.path": []},
            seen_s={"run.dir": 0.1, "data.path": 0.0},
            shares_lock=None if rank == 0 else True,
            clock_s=0.01 * rank,
            pairs=dict.fromkeys(peers, 40e9),
            all_reduce=50e9,
            all_to_all=35e9,
        ),
    )


def gpu(index: int) -> Gpu:
    return Gpu(
        index=index,
        name="H100",
        uuid=f"GPU-{index}",
        driver="575.51",
        total_bytes=80 * GIB,
        power_limit_w=700,
        reading=Reading(temperature_c=55, power_w=690, memory_bytes=GIB, throttling=("power limit",)),
        ecc_errors=0,
        pcie_width=16,
        pcie_width_max=16,
        nvlinks=18,
        paths=("", "NVLink"),
    )


def node(change: Callable[[Facts], dict[str, Any]], *at: int) -> list[Facts]:
    """Three healthy nodes, changed at those ranks."""
    nodes = [healthy(rank) for rank in range(3)]
    return [n.model_copy(update=change(n)) if rank in at else n for rank, n in enumerate(nodes)]


def meeting(**changes: Any) -> Callable[[Facts], dict[str, Any]]:
    return lambda n: {"meeting": n.meeting.model_copy(update=changes)} if n.meeting else {}


def folder(setting: str, **changes: Any) -> Callable[[Facts], dict[str, Any]]:
    return lambda n: {"folders": n.folders | {setting: n.folders[setting].model_copy(update=changes)}}


def first_gpu(**changes: Any) -> Callable[[Facts], dict[str, Any]]:
    return lambda n: {"gpus": (n.gpus[0].model_copy(update=changes), *n.gpus[1:])}


def fields(**changes: Any) -> Callable[[Facts], dict[str, Any]]:
    return lambda n: changes


def test_of_healthy_nodes_every_check_is_ok() -> None:
    verdicts = judge([healthy(rank) for rank in range(3)], FOLDERS, RAY)
    assert {verdict.level for verdict in verdicts} == {"ok"}
    said = {verdict.check: verdict.says for verdict in verdicts}
    assert len(said) == len(verdicts) == 11
    assert said["run.dir"] == "/shared/run, what one writes all see within 0.10 s, 900 GiB free"
    assert said["gpus"] == "6 H100 (driver 575.51)"
    assert said["clocks"] == "within 0.020 s"
    assert said["network"] == "all-reduce 50 GB/s, all-to-all 35 GB/s, a pair 40 GB/s"


def test_a_machine_alone_is_not_asked_for_what_only_several_have() -> None:
    alone = healthy(0).model_copy(update={"meeting": None, "has_token": False, "name_means": "127.0.1.1"})
    verdicts = judge([alone], {})
    checks = ["versions", "shared memory", "open files", "host name", "gpus", "matmul"]
    assert [(verdict.check, verdict.level) for verdict in verdicts] == [(check, "ok") for check in checks]


HOT = Reading(temperature_c=93, power_w=300, memory_bytes=GIB, throttling=("heat", "power limit"))
WARM = HOT.model_copy(update={"throttling": ()})
LITTLE = 2**20 * 64
CASES: dict[str, tuple[list[Facts], str, str, str]] = {
    "torch differs": (
        node(lambda n: {"versions": n.versions | {"torch": "2.12.1"}}, 2),
        "versions", "bad", "torch: n2 has 2.12.1, the others 2.13.0; install the same everywhere",
    ),
    "ray is missing": (
        node(lambda n: {"versions": {k: v for k, v in n.versions.items() if k != "ray"}}, 0),
        "versions", "bad", "ray: n0 has none, the others 2.60.0; install",
    ),
    "another checkout": (
        node(lambda n: {"versions": n.versions | {"moray": "0.1 (source 99999999)"}}, 1),
        "versions", "bad", "moray: n1 has 0.1 (source 99999999), the others 0.1 (source 12345678)",
    ),
    "no token": (node(fields(has_token=False), 1), "cluster", "bad", "n1: RAY_AUTH_MODE=token is not set there"),
    "no run folder": (
        node(folder("run.dir", is_there=False, is_writable=False), 1),
        "run.dir", "bad", "run.dir=/shared/run: not there on n1; mount the same storage on all nodes",
    ),
    "no writing": (
        node(folder("run.dir", is_writable=False, problem="Permission denied"), 2),
        "run.dir", "bad", "n2 cannot write there (Permission denied)",
    ),
    "no data": (node(folder("data.path", is_there=False), 2), "data.path", "bad", "/shared/data: not there on n2"),
    "no reading": (
        node(folder("data.path", index=None, problem="Permission denied"), 0, 1, 2),
        "data.path", "bad", "no dataset that n0 can read (Permission denied)",
    ),
    "other data": (node(folder("data.path", index="ef"), 1), "data.path", "bad", "n1 has another index.json"),
    "not shared": (
        node(meeting(unseen={"run.dir": [0, 1]}), 2),
        "run.dir", "bad", "n2 does not see what n0, n1 wrote; mount the same storage",
    ),
    "seen late": (node(meeting(seen_s={"run.dir": 4.0}), 2), "run.dir", "note", "n2 saw what others wrote after 4.0 s"),
    "no locks": (node(folder("run.dir", has_locks=False), 0, 1, 2), "run.dir", "note", "locked on n0, n1, n2"),
    "locks of one host": (node(meeting(shares_lock=False), 1), "run.dir", "note", "a lock of n0 is none on n1"),
    "little room": (node(folder("run.dir", free_bytes=3 * GIB), 0), "run.dir", "note", "n0: 3.0 GiB free"),
    "no room": (node(folder("run.dir", free_bytes=LITTLE), 0), "run.dir", "bad", "n0: 0.1 GiB free"),
    "little shared memory": (
        node(fields(shared_memory_bytes=LITTLE), 1), "shared memory", "bad", "n1: 0.06 GiB are free in /dev/shm"
    ),
    "few files": (node(fields(open_files=2048), 1), "open files", "note", "n1: a process may open 2048 files; ulimit"),
    "too few files": (node(fields(open_files=256), 1), "open files", "bad", "n1: a process may open 256 files"),
    "loopback": (node(fields(name_means="127.0.1.1"), 2), "host name", "note", "n2: its own name means 127.0.1.1"),
    "no name": (node(fields(name_means=None), 2), "host name", "note", "n2: its own name has no address"),
    "broken driver": (
        node(fields(gpu_problem="NVML: Driver/library version mismatch"), 0),
        "gpus", "bad", "n0: NVML: Driver/library version mismatch; load the driver anew",
    ),
    "lost": (node(first_gpu(problem="GPU is lost"), 1), "gpus", "bad", "n1, GPU 0: GPU is lost; reset it"),
    "ecc": (node(first_gpu(ecc_errors=3), 1), "gpus", "bad", "n1, GPU 0: 3 uncorrected memory errors (ECC)"),
    "throttled": (node(first_gpu(reading=HOT), 1), "gpus", "note", "n1, GPU 0: throttled by heat, 93 degrees C"),
    "hot": (node(first_gpu(reading=WARM), 1), "gpus", "note", "n1, GPU 0: 93 degrees C: look at its cooling"),
    "narrow": (node(first_gpu(pcie_width=4), 0), "gpus", "note", "n0, GPU 0: PCIe x4 of x16"),
    "foreign": (
        node(first_gpu(processes=(GpuProcess(pid=7, memory_bytes=GIB), GpuProcess(pid=9, memory_bytes=None))), 0),
        "gpus", "note", "n0, GPU 0: others compute on it (pid 7, 9, 1.0 GiB)",
    ),
    "a link down": (node(first_gpu(nvlinks=17), 2), "gpus", "note", "n2: its GPUs have 17, 18 NVLinks up"),
    "fewer": (node(lambda n: {"gpus": n.gpus[:1]}, 1), "gpus", "note", "n1: 1 GPUs, the others have 2"),
    "another driver": (node(first_gpu(driver="550.1"), 1), "gpus", "note", "driver of the GPUs: n1 not 575.51"),
    "hidden": (node(fields(device="cpu"), 1), "gpus", "note", "n1: it has GPUs, but torch uses none here"),
    "slow node": (node(fields(peak_flops=400e12), 1), "matmul", "note", "n1: 400 TFLOP/s where 700 is usual"),
    "clock ahead": (node(meeting(clock_s=65.0), 1), "clocks", "bad", "n1: 65.0 s ahead of the others; start chrony"),
    "clock of rank 0": (
        node(meeting(clock_s=9.0), 1, 2), "clocks", "bad", "n0: 9.0 s behind the others"
    ),
    "slow pair": (
        node(meeting(pairs={0: 40e9, 2: 5e9}), 1), "network", "note", "n1 and n2: 5 GB/s, where 40 GB/s is usual"
    ),
    "slow link of one among many": (
        [
            healthy(rank % 3).model_copy(
                update={
                    "host": f"n{rank}",
                    "meeting": Meeting(pairs={p: 4e9 if 3 in (p, rank) else 40e9 for p in range(5) if p != rank}),
                }
            )
            for rank in range(5)
        ],
        "network", "note", "n3: 4 GB/s to every other node, where 40 GB/s is usual",
    ),
    "no network": (
        node(meeting(problem="Connection refused", pairs={}, clock_s=None), 0, 1, 2),
        "network", "bad", "did not reach each other (n0: Connection refused, n1: Connection refused,",
    ),
    "absent": (node(fields(meeting=None), 2), "network", "bad", "n2 did not come to measure it"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named_once_with_what_to_do(case: str) -> None:
    nodes, check, level, says = CASES[case]
    found = [verdict for verdict in judge(nodes, FOLDERS, RAY) if verdict.level != "ok"]
    assert {(verdict.check, verdict.level) for verdict in found} == {(check, level)}, found
    assert says in found[0].says
    assert len(found) == (3 if case == "no reading" else 1)


@pytest.mark.parametrize(
    ("changes", "level", "says"),
    [
        (
            {"is_open": True},
            "bad",
            "the Ray at 10.0.0.1:6379 asks for no token: whoever reaches it can run code as you",
        ),
        ({"busy": ("10.0.0.4",)}, "note", "10.0.0.4: no slot is free there, so nobody has looked"),
        ({"failure": "node n1: lost"}, "bad", "the nodes could not be looked at: node n1: lost"),
    ],
)
def test_the_cluster_itself(changes: dict[str, Any], level: str, says: str) -> None:
    verdicts = judge([healthy(rank) for rank in range(3)], FOLDERS, RAY.model_copy(update=changes))
    assert [(v.check, v.level) for v in verdicts if v.level != "ok"] == [("cluster", level)]
    assert says in verdicts[0].says


def test_workers_that_all_failed_leave_one_line() -> None:
    (verdict,) = judge([], FOLDERS, RAY.model_copy(update={"failure": "an agent did not start"}))
    assert (verdict.check, verdict.level) == ("cluster", "bad")
