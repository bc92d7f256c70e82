"""Whether the GPUs of all nodes are well, alike and free."""

from collections import Counter
from collections.abc import Iterator, Sequence

from moray.cluster.nvml import HEAT, POWER_BRAKE, SLOWDOWN, Gpu
from moray.jobs.doctor.facts import Facts
from moray.jobs.doctor.verdict import GIB, Level, Verdict, check

HOT_C = 90
NOT_USUAL = {HEAT, POWER_BRAKE, SLOWDOWN}
"""Reasons of throttling that a machine in good order does not have; the power limit is met by every busy GPU."""


def judge_gpus(nodes: Sequence[Facts]) -> list[Verdict]:
    """Of all GPUs that NVML shows, hidden ones too."""
    kinds = Counter((gpu.name, gpu.driver) for node in nodes for gpu in node.gpus if not gpu.problem)
    said = [f"{count} {name} (driver {driver})" for (name, driver), count in kinds.items()]
    found = [finding for node in nodes for finding in _node(node)]
    return check("gpus", ", ".join(said) or "none: workers take CPUs", [*found, *_differences(nodes)])


def _node(node: Facts) -> Iterator[tuple[Level, str]]:
    if node.gpu_problem:
        yield "bad", f"{node.host}: {node.gpu_problem}; load the driver anew, or start the machine anew"
    for gpu in node.gpus:
        where = f"{node.host}, GPU {gpu.index}"
        if gpu.problem:
            yield "bad", f"{where}: {gpu.problem}; reset it, or start the machine anew"
        else:
            yield from ((level, f"{where}: {says}") for level, says in _gpu(gpu))
    if node.gpus and node.device == "cpu":
        yield "note", f"{node.host}: it has GPUs, but torch uses none here; look at CUDA_VISIBLE_DEVICES and torch"
    if len({gpu.nvlinks for gpu in node.gpus if not gpu.problem}) > 1:
        links = ", ".join(str(gpu.nvlinks) for gpu in node.gpus)
        yield "note", f"{node.host}: its GPUs have {links} NVLinks up; look at nvidia-smi nvlink --status"


def _gpu(gpu: Gpu) -> Iterator[tuple[Level, str]]:
    if gpu.ecc_errors:
        yield "bad", f"{gpu.ecc_errors} uncorrected memory errors (ECC): reset or replace it"
    if gpu.reading:
        if why := sorted(NOT_USUAL.intersection(gpu.reading.throttling)):
            degrees = gpu.reading.temperature_c
            yield "note", f"throttled by {', '.join(why)}, {degrees} degrees C: look at its cooling and power"
        elif (gpu.reading.temperature_c or 0) >= HOT_C:
            yield "note", f"{gpu.reading.temperature_c} degrees C: look at its cooling"
    if gpu.pcie_width and gpu.pcie_width_max and gpu.pcie_width < gpu.pcie_width_max:
        yield "note", f"PCIe x{gpu.pcie_width} of x{gpu.pcie_width_max}: seat it anew, or choose another slot"
    if gpu.processes:
        pids = ", ".join(str(process.pid) for process in gpu.processes)
        held = sum(process.memory_bytes or 0 for process in gpu.processes) / GIB
        yield "note", f"others compute on it (pid {pids}, {held:.1f} GiB): they take its time and memory"


def _differences(nodes: Sequence[Facts]) -> Iterator[tuple[Level, str]]:
    counts = Counter(len(node.gpus) for node in nodes)
    usual = counts.most_common(1)[0][0]
    for node in nodes:
        if len(node.gpus) != usual:
            yield "note", f"{node.host}: {len(node.gpus)} GPUs, the others have {usual}"
    for what in ("name", "driver"):
        found = Counter(getattr(gpu, what) for node in nodes for gpu in node.gpus if not gpu.problem)
        if len(found) > 1:
            usual_one = found.most_common(1)[0][0]
            odd = [n.host for n in nodes if any(getattr(g, what) not in ("", usual_one) for g in n.gpus)]
            yield "note", f"{what} of the GPUs: {', '.join(odd)} not {usual_one} as the others"
