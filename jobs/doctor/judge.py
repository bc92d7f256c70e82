"""From the facts of all nodes to a line a check: all is well, or what to do. Pure: nothing is looked at here."""

import ipaddress
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from moray.jobs.doctor.facts import Facts, Frozen
from moray.jobs.doctor.judge_folders import judge_folder
from moray.jobs.doctor.judge_gpus import judge_gpus
from moray.jobs.doctor.judge_network import judge_clocks, judge_network
from moray.jobs.doctor.verdict import GIB, Level, Verdict, check, listed

Findings = Iterator[tuple[Level, str]]
LITTLE_SHARED_MEMORY = GIB
OPEN_FILES = 4096
SLOW_NODE = 0.8


class Cluster(Frozen):
    """The Ray that a run would use. busy: nodes without a free slot, at which nobody looked. failure: the workers'."""

    address: str
    is_open: bool = False
    busy: tuple[str, ...] = ()
    failure: str | None = None


def judge(nodes: Sequence[Facts], folders: Mapping[str, str], cluster: Cluster | None = None) -> list[Verdict]:
    """At least one verdict a check. nodes: by rank; folders: by setting; cluster: None for this machine alone."""
    verdicts = list[Verdict]()
    if cluster:
        verdicts += check("cluster", f"{listed(n.host for n in nodes)}; Ray asks for a token", _cluster(nodes, cluster))
    if not nodes:
        return verdicts
    agreed = ", ".join(f"{name} {version}" for name, version in nodes[0].versions.items())
    verdicts += check("versions", agreed, _versions(nodes))
    for setting, path in folders.items():
        verdicts += judge_folder(setting, path, nodes)
    verdicts += check("shared memory", "enough is free in /dev/shm", _shared_memory(nodes))
    verdicts += check("open files", f"{min(n.open_files for n in nodes)} a process", _open_files(nodes))
    verdicts += check("host name", listed(f"{n.host} is {n.name_means}" for n in nodes), _names(nodes))
    verdicts += judge_gpus(nodes)
    slowest, fastest = (f"{best(n.peak_flops for n in nodes) / 1e12:.3g}" for best in (min, max))
    span = slowest if slowest == fastest else f"{slowest} to {fastest}"
    verdicts += check("matmul", f"{span} TFLOP/s on {nodes[0].device}", _speed(nodes))
    if len(nodes) > 1:
        verdicts += judge_clocks(nodes) + judge_network(nodes)
    return verdicts


def _cluster(nodes: Sequence[Facts], cluster: Cluster) -> Findings:
    if cluster.failure:
        yield "bad", f"the nodes could not be looked at: {cluster.failure}"
    if cluster.busy:
        yield "note", f"{listed(cluster.busy)}: no slot is free there, so nobody has looked; ask again when one is"
    if cluster.is_open:
        start = "start it with RAY_AUTH_MODE=token"
        yield "bad", f"the Ray at {cluster.address} asks for no token: whoever reaches it can run code as you; {start}"
    elif without := [node.host for node in nodes if not node.has_token]:
        yield "bad", f"{listed(without)}: RAY_AUTH_MODE=token is not set there, but elsewhere; start its Ray with it"


def _versions(nodes: Sequence[Facts]) -> Findings:
    for name in dict.fromkeys(name for node in nodes for name in node.versions):
        found = [node.versions.get(name, "none") for node in nodes]
        usual = Counter(found).most_common(1)[0][0]
        if odd := [f"{node.host} has {has}" for node, has in zip(nodes, found, strict=True) if has != usual]:
            yield "bad", f"{name}: {listed(odd)}, the others {usual}; install the same everywhere"


def _shared_memory(nodes: Sequence[Facts]) -> Findings:
    for node in nodes:
        free = node.shared_memory_bytes
        if free is not None and free < LITTLE_SHARED_MEMORY:
            # NCCL cannot do without between GPUs of a machine; Ray takes /tmp instead.
            level: Level = "bad" if len(node.gpus) > 1 else "note"
            says = f"{node.host}: {free / GIB:.2f} GiB are free in /dev/shm; give it 1 GiB or more (docker --shm-size)"
            yield level, says


def _open_files(nodes: Sequence[Facts]) -> Findings:
    for node in nodes:
        if node.open_files < OPEN_FILES:
            level: Level = "bad" if node.open_files < OPEN_FILES // 4 else "note"
            yield level, f"{node.host}: a process may open {node.open_files} files; ulimit -n {16 * OPEN_FILES}"


def _names(nodes: Sequence[Facts]) -> Findings:
    if len(nodes) < 2:
        return
    for node in nodes:
        if node.name_means is None:
            yield "note", f"{node.host}: its own name has no address; write it into /etc/hosts"
        elif ipaddress.ip_address(node.name_means).is_loopback:
            yield (
                "note",
                f"{node.host}: its own name means {node.name_means}, which leads nowhere else. moray goes by the "
                "address that others see; what goes by names does not: correct its /etc/hosts",
            )


def _speed(nodes: Sequence[Facts]) -> Findings:
    usual = median(node.peak_flops for node in nodes)
    for node in nodes:
        if node.peak_flops < SLOW_NODE * usual:
            peak = f"{node.peak_flops / 1e12:.3g} TFLOP/s where {usual / 1e12:.3g} is usual"
            yield "note", f"{node.host}: {peak}: all will wait for it; is it hot, or busy with something else?"
