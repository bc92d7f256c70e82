"""The device of a worker, whether it is fit to be used, and how much of its memory is."""

import resource
import sys
from typing import Literal

import torch

from moray import UserError

Device = Literal["auto", "cpu", "cuda"]


def pick_device(local_rank: int, wanted: Device) -> torch.device:
    """The CUDA device of this local rank, or the CPU; auto: the CPU where this machine has no CUDA device.

    Raises UserError where it has none though one is wanted, or fewer than its workers.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "cluster.device=cuda, but this machine shows no GPU that torch can use; set cluster.device=cpu, "
            "or look at its driver and CUDA_VISIBLE_DEVICES"
        )
    n_devices = torch.cuda.device_count()
    if local_rank >= n_devices:
        raise UserError(
            f"local rank {local_rank} has no GPU: this machine shows {n_devices}; start at most {n_devices}"
        )
    return torch.device("cuda", local_rank)


def check_health(device: torch.device) -> None:
    """Raises RuntimeError where NVML counts uncorrected memory errors on this GPU since its last reset.

    Such a GPU computes wrong numbers or dies in the middle of a step. CPUs pass.
    """
    if device.type != "cuda":
        return
    from moray.cluster.nvml import find_gpu, uncorrected_errors

    handle = find_gpu(str(torch.cuda.get_device_properties(device).uuid))
    n_errors = uncorrected_errors(handle) if handle else None
    if n_errors:
        raise RuntimeError(f"{device} has {n_errors} uncorrected memory errors (ECC): reset or replace this GPU")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has used so far: of the GPU by its tensors, on a CPU all that was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
