"""A worker's own time holds its work and what keeps it from its core, not its waiting for others."""

import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool

from moray.cluster.own_time import busy_seconds, own_time

CPU = torch.device("cpu")


def burn(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def measure_uneven_work() -> float | None:
    with own_time(CPU) as own_seconds:
        burn(0.4 * dist.get_rank())
        dist.all_reduce(torch.ones(1000))
    return own_seconds()


def test_waiting_in_a_collective_is_not_ones_own_time(pool: Pool) -> None:
    waited, worked = pool.run(measure_uneven_work, 2)
    assert worked >= 0.4
    assert waited < worked / 4


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores can be chosen on Linux alone")
def test_who_shares_a_core_takes_longer() -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with own_time(CPU) as own_seconds:
            burn(0.3)
    finally:
        rival.kill()
        rival.wait()
        os.sched_setaffinity(0, cores)
    assert (own_seconds() or 0) > 0.4, "0.3 s of work, and the rival's turns"


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([], 0.0),
        ([(0, 10), (20, 25)], 15e-9),
        ([(0, 10), (5, 12), (6, 7)], 12e-9),
        ([(30, 40), (0, 10), (10, 20)], 30e-9),
    ],
)
def test_what_runs_side_by_side_on_a_gpu_counts_once(spans: Any, seconds: float) -> None:
    assert busy_seconds(spans) == pytest.approx(seconds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_that_of_its_kernels() -> None:
    device = torch.device("cuda", 0)
    a = torch.randn(4096, 4096, device=device)
    a @ a
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with own_time(device) as own_seconds:
        begin.record()
        for _ in range(20):
            a @ a
        end.record()
        torch.cuda.synchronize()
        time.sleep(0.5)
    assert own_seconds() == pytest.approx(begin.elapsed_time(end) / 1e3, rel=0.2)
