"""The same worker function under a real torchrun."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from counting import Plan, count, history
from nodes_of_one import two_nodes

from moray.cluster.events import read_events
from moray.cluster.group import Group
from moray.cluster.launch import launch

SCRIPT = Path(__file__).parent / "counting.py"


def command(*options: str, folder: Path, steps: int, pause_s: float) -> list[str]:
    script = [str(SCRIPT), "torchrun", "2", str(folder), str(steps), str(pause_s)]
    return [sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "0.1", *options, *script]


@contextmanager
def torchrun(folder: Path, steps: int, pause_s: float, max_restarts: int = 0) -> Iterator[subprocess.Popen[str]]:
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(max_restarts)]
    words = command(*options, folder=folder, steps=steps, pause_s=pause_s)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_two_ranks_count_together(tmp_path: Path) -> None:
    with torchrun(tmp_path, 5, 0.0) as process:
        output, _ = process.communicate(timeout=50)
        assert process.returncode == 0
    assert history(tmp_path) == [(step, 1) for step in range(1, 6)]
    assert (tmp_path / "rank-1-of-2").exists()
    assert "rank 0 step 5" in output
    assert "rank 1" not in output
    assert [event["kind"] for event in read_events(tmp_path / "events.jsonl")] == ["start", "ready", "end"]


def test_torchrun_restarts_a_killed_rank_as_the_next_generation(tmp_path: Path) -> None:
    with torchrun(tmp_path, 40, 0.02, max_restarts=1) as process:
        assert process.stdout
        for line in process.stdout:
            if "rank 0 step 10 " in line:
                os.kill(int(line.split()[0]), signal.SIGKILL)
                break
        process.communicate(timeout=50)
        assert process.returncode == 0
    assert [step for step, _ in history(tmp_path)] == list(range(1, 41))
    assert {generation for _, generation in history(tmp_path)} == {1, 2}
    with torchrun(tmp_path, 45, 0.0) as process:
        process.communicate(timeout=50)
    assert history(tmp_path)[40:] == [(step, 3) for step in range(41, 46)]
    kinds = [
        (event["kind"], event["generation"])
        for event in read_events(tmp_path / "events.jsonl")
        if "generation" in event
    ]
    assert kinds == [("start", 1), ("ready", 1), ("start", 2), ("recovered", 2), ("start", 3), ("ready", 3)]


def test_torchrun_passes_sigterm_on(tmp_path: Path) -> None:
    with torchrun(tmp_path, 100000, 0.02) as process:
        assert process.stdout
        assert "step 1 " in process.stdout.readline()
        process.terminate()
        process.communicate(timeout=50)
    assert (tmp_path / "stopped-0").exists()
    assert (tmp_path / "stopped-1").exists()


def test_a_killed_torchrun_takes_its_workers_along(tmp_path: Path) -> None:
    with torchrun(tmp_path, 100, 0.1) as process:
        assert process.stdout
        line = next(line for line in process.stdout if "step 3 " in line)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 5
        while (is_alive := Path(f"/proc/{line.split()[0]}").exists()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_alive
    done = len(history(tmp_path))
    assert done < 100
    with torchrun(tmp_path, done + 5, 0.0) as process:
        process.communicate(timeout=50)
        assert process.returncode == 0
    assert [step for step, _ in history(tmp_path)] == list(range(1, done + 6))


def test_two_nodes_whose_own_names_mean_loopback(tmp_path: Path) -> None:
    """Left to itself, gloo listens where a host's own name points to, and its peers on the other node find nobody."""
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:29555"]
    words = command(*options, folder=tmp_path, steps=5, pause_s=0.0)
    with two_nodes(tmp_path) as nodes:
        processes = [subprocess.Popen(node.command(*words), start_new_session=True) for node in nodes]
        try:
            assert [process.wait(50) for process in processes] == [0, 0]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    assert [step for step, _ in history(tmp_path)] == list(range(1, 6))


def test_without_torchrun() -> None:
    with pytest.raises(ValueError, match=r"cluster.launcher=torchrun needs processes that torchrun started"):
        launch(count, Plan("", 1), "torchrun", Group(workers=2))
