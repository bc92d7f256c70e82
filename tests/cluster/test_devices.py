import re
from pathlib import Path

import numpy as np
import pytest
import torch

from moray import UserError
from moray.cluster.devices import check_health, peak_memory_bytes, pick_device


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_every_local_rank_is_on_the_cpu() -> None:
    assert pick_device(0, "auto") == pick_device(7, "auto") == pick_device(0, "cpu") == torch.device("cpu")
    check_health(torch.device("cpu"))
    with pytest.raises(
        UserError, match=r"^cluster.device=cuda, but this machine shows no GPU .* set cluster.device=cpu"
    ):
        pick_device(0, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_with_gpus_a_local_rank_has_its_own() -> None:
    assert pick_device(0, "auto") == pick_device(0, "cuda") == torch.device("cuda", 0)
    assert pick_device(0, "cpu") == torch.device("cpu")
    check_health(torch.device("cuda", 0))
    n_devices = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"this machine shows {n_devices}"):
        pick_device(n_devices, "auto")


def test_peak_memory_is_the_kernels_high_water_mark() -> None:
    ballast = np.ones(40_000_000)
    del ballast
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match
    peak = peak_memory_bytes(torch.device("cpu"))
    assert peak == pytest.approx(int(match[1]) * 1024, rel=0.02)
    assert peak > 320_000_000
