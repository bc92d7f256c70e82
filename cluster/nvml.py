"""What NVML, the driver's own interface, knows of this machine's GPUs: hidden ones too. Imports no torch."""

import os
from collections.abc import Callable
from typing import Any

import pynvml
from pydantic import BaseModel, ConfigDict

# What is no answer: this GPU, this driver or this user has none.
SILENT = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NOT_FOUND,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_UNKNOWN,
)
HEAT, POWER_BRAKE, SLOWDOWN = "heat", "power brake", "hardware slowdown"
THROTTLING = {
    pynvml.nvmlClocksEventReasonSwPowerCap: "power limit",
    pynvml.nvmlClocksEventReasonHwSlowdown: SLOWDOWN,
    pynvml.nvmlClocksEventReasonSyncBoost: "sync boost",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: HEAT,
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: HEAT,
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: POWER_BRAKE,
}
PATHS = {
    pynvml.NVML_TOPOLOGY_INTERNAL: "same board",
    pynvml.NVML_TOPOLOGY_SINGLE: "PCIe switch",
    pynvml.NVML_TOPOLOGY_MULTIPLE: "PCIe switches",
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: "host bridge",
    pynvml.NVML_TOPOLOGY_NODE: "same NUMA node",
    pynvml.NVML_TOPOLOGY_SYSTEM: "across NUMA nodes",
}


class GpuProcess(BaseModel):
    """A process that computes on a GPU; of one in another container, memory alone is known (pid 0)."""

    model_config = ConfigDict(frozen=True)
    pid: int
    memory_bytes: int | None


class Reading(BaseModel):
    """What changes while a GPU works; memory is that of all processes. None: it does not tell."""

    model_config = ConfigDict(frozen=True)
    temperature_c: int | None
    power_w: float | None
    memory_bytes: int | None
    throttling: tuple[str, ...] = ()


class Gpu(BaseModel):
    """One GPU. `problem`: why it does not answer (lost, in need of a reset), and then nothing else is known.

    ecc_errors: uncorrected ones since the last reset. paths: how it reaches each of the machine's GPUs, by index.
    processes: those of others.
    """

    model_config = ConfigDict(frozen=True)
    index: int
    problem: str | None = None
    name: str = ""
    uuid: str = ""
    driver: str = ""
    total_bytes: int | None = None
    power_limit_w: float | None = None
    reading: Reading | None = None
    ecc_errors: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    nvlinks: int = 0
    paths: tuple[str, ...] = ()
    processes: tuple[GpuProcess, ...] = ()


def read_gpus() -> list[Gpu]:
    """All GPUs of this machine; none without a driver. Raises RuntimeError where there is one that does not work."""
    try:
        pynvml.nvmlInit()
        indices = range(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError as error:
        if error.value in (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED):
            return []
        raise RuntimeError(f"NVML: {error}") from None
    return [_read_gpu(index, indices) for index in indices]


def find_gpu(uuid: str) -> Any | None:
    """NVML's handle of the GPU with this UUID; None where NVML does not know it (a slice of a GPU, no NVML)."""
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None


def uncorrected_errors(handle: Any) -> int | None:
    """Uncorrected memory errors since the last reset; None without ECC."""
    uncorrected, since_reset = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    return _ask(pynvml.nvmlDeviceGetTotalEccErrors, handle, uncorrected, since_reset)


def read_now(handle: Any) -> Reading:
    """Raises pynvml.NVMLError where the GPU is lost."""
    milliwatts = _ask(pynvml.nvmlDeviceGetPowerUsage, handle)
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    # Drivers before 535 know only the second name.
    reasons = _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if reasons is None:
        reasons = _ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    return Reading(
        temperature_c=_ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        power_w=None if milliwatts is None else milliwatts / 1000,
        memory_bytes=None if memory is None else memory.used,
        throttling=tuple(dict.fromkeys(name for bit, name in THROTTLING.items() if reasons & bit)),
    )


def _read_gpu(index: int, indices: range) -> Gpu:
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
        limit = _ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        running = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
        return Gpu(
            index=index,
            name=pynvml.nvmlDeviceGetName(handle),
            uuid=pynvml.nvmlDeviceGetUUID(handle),
            driver=pynvml.nvmlSystemGetDriverVersion(),
            total_bytes=None if memory is None else memory.total,
            power_limit_w=None if limit is None else limit / 1000,
            reading=read_now(handle),
            ecc_errors=uncorrected_errors(handle),
            pcie_width=_ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
            pcie_width_max=_ask(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
            nvlinks=_count_nvlinks(handle),
            paths=tuple("" if other == index else _path(handle, other) for other in indices),
            processes=tuple(
                GpuProcess(pid=process.pid, memory_bytes=process.usedGpuMemory)
                for process in running
                if process.pid != os.getpid()
            ),
        )
    except pynvml.NVMLError as error:
        return Gpu(index=index, problem=str(error))


def _count_nvlinks(handle: Any) -> int:
    n_active = 0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        state = _ask(pynvml.nvmlDeviceGetNvLinkState, handle, link)
        if state is None:  # behind the last one
            break
        n_active += state
    return n_active


def _path(handle: Any, other: int) -> str:
    try:
        peer = pynvml.nvmlDeviceGetHandleByIndex(other)
    except pynvml.NVMLError:
        return "unknown"
    if _ask(pynvml.nvmlDeviceGetP2PStatus, handle, peer, pynvml.NVML_P2P_CAPS_INDEX_NVLINK) == 0:
        return "NVLink"
    return PATHS.get(_ask(pynvml.nvmlDeviceGetTopologyCommonAncestor, handle, peer), "unknown")


def _ask(question: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return question(*arguments)
    except pynvml.NVMLError as error:
        if error.value in SILENT:
            return None
        raise
