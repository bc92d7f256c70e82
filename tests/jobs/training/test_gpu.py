"""A run on a GPU: it computes what one on a CPU does, stops when asked, and goes on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import tiny

from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.training.metrics import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
STEPS = 30
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "moray"]
ALONE = [sys.executable, "-m", "moray"]


def start(launcher: list[str], data: Path, run: Path, device: str, **changes: object) -> subprocess.Popen[bytes]:
    kind = "torchrun" if launcher is TORCHRUN else "local"
    plan = {"cluster__launcher": kind, "cluster__device": device, "train__steps": STEPS, "train__eval_every": 0}
    return subprocess.Popen([*launcher, "pretrain", *tiny(data, run, **{**plan, **changes})])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_as_on_a_cpu(dataset: Path, tmp_path: Path, dtype: str) -> None:
    for device in ("cpu", "cuda"):
        assert start(ALONE, dataset, tmp_path / device, device, train__dtype=dtype).wait(timeout=100) == 0
    on_cpu, on_gpu = (read_metrics(tmp_path / device) for device in ("cpu", "cuda"))
    assert [row["positions"] for row in on_gpu] == [row["positions"] for row in on_cpu]
    tolerance = 1e-4 if dtype == "float32" else 0.02
    assert [row["loss"] for row in on_gpu] == pytest.approx([row["loss"] for row in on_cpu], rel=tolerance)
    assert on_gpu[-1]["memory_bytes"] > 0


@pytest.mark.parametrize("launcher", [ALONE, TORCHRUN], ids=["alone", "torchrun"])
def test_it_stops_when_asked_and_goes_on(launcher: list[str], dataset: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start(launcher, dataset, whole, "cuda").wait(timeout=100) == 0
    first = start(launcher, dataset, run, "cuda")
    while len(read_metrics(run)) < 5:
        assert first.poll() is None
        time.sleep(0.001)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == (75 if launcher is ALONE else 1)  # torchrun has a code of its own
    assert len(read_metrics(run)) < STEPS
    assert start(launcher, dataset, run, "cuda").wait(timeout=100) == 0
    assert ledger_problems(run) == []
    for row, expected in zip(read_metrics(run), read_metrics(whole), strict=True):
        assert row["positions"] == expected["positions"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
