"""NVML at its C interface: a small library in its place, which pynvml loads as it would load the driver's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moray.cluster.nvml import find_gpu, read_gpus, read_now

GIB = 2**30
ASK = """
import json
from moray.cluster.nvml import find_gpu, read_gpus, read_now, uncorrected_errors
zero = find_gpu("zero")
print(json.dumps({
    "gpus": [gpu.model_dump() for gpu in read_gpus()],
    "now": read_now(zero).model_dump(),
    "errors": uncorrected_errors(zero),
    "unknown": find_gpu("another"),
}))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("nvml_stand_in.c")
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", str(library), str(source)], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_gpu_is_described_as_nvml_tells(told: Any) -> None:
    first = told["gpus"][0]
    assert (first["name"], first["uuid"], first["driver"]) == ("Stand-in 80GB", "GPU-zero", "575.51.03")
    assert (first["total_bytes"], first["power_limit_w"], first["problem"]) == (80 * GIB, 700.0, None)
    expected = {"temperature_c": 61, "power_w": 412.5, "memory_bytes": 30 * GIB, "throttling": ["power limit"]}
    assert first["reading"] == told["now"] == expected
    assert (first["pcie_width"], first["pcie_width_max"], first["nvlinks"]) == (16, 16, 2)


def test_what_a_gpu_does_not_tell_is_unknown_and_costs_nothing_else(told: Any) -> None:
    first, second, _ = told["gpus"]
    assert first["ecc_errors"] is told["errors"] is told["unknown"] is None
    assert second["ecc_errors"] == 7, "uncorrected ones, since the last reset"
    assert second["reading"] == {
        "temperature_c": 91, "power_w": None, "memory_bytes": 30 * GIB, "throttling": ["heat"]
    }  # fmt: skip


def test_how_gpus_reach_each_other_is_told(told: Any) -> None:
    assert [gpu["paths"] for gpu in told["gpus"][:2]] == [["", "NVLink", "unknown"], ["host bridge", "", "unknown"]]


def test_foreign_processes_are_told(told: Any) -> None:
    assert told["gpus"][0]["processes"] == [
        {"pid": 4711, "memory_bytes": 3 * GIB}, {"pid": 4712, "memory_bytes": None}
    ]  # fmt: skip
    assert told["gpus"][1]["processes"] == []


def test_a_gpu_that_fell_off_its_bus_is_told_of_beside_the_others(told: Any) -> None:
    assert (told["gpus"][2]["index"], told["gpus"][2]["problem"]) == (2, "GPU is lost")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_driver_has_no_gpus() -> None:
    assert read_gpus() == []
    assert find_gpu("zero") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_true_gpu_is_the_one_that_torch_knows() -> None:
    torch.cuda.init()
    properties = torch.cuda.get_device_properties(0)
    (gpu,) = [gpu for gpu in read_gpus() if gpu.uuid == f"GPU-{properties.uuid}"]
    assert gpu.name == properties.name
    assert gpu.total_bytes == pytest.approx(properties.total_memory, rel=0.1)
    now = read_now(find_gpu(str(properties.uuid)))
    free, total = torch.cuda.mem_get_info(0)
    assert now.memory_bytes == pytest.approx(total - free, rel=0.2)
    assert 10 < (now.temperature_c or 0) < 110
