"""Drivers that are interrupted, terminated and killed, with a Ray of their own."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from counting import history
from processes import marked_processes

from moray.cluster.events import read_events

SCRIPT = Path(__file__).parent / "counting.py"
GONE_WITHIN_S = 15

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def mark() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def start(mark: str) -> Iterator[Start]:
    """Starts a driver in a process group of its own, as a terminal would; kills all that it left behind."""
    drivers = []

    def start(folder: Path, steps: int, pause_s: float, **more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPT), "ray", "2", str(folder), str(steps), str(pause_s)]
        environment = (
            {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"MARK": mark} | more
        )
        driver = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        drivers.append(driver)
        return driver

    yield start
    for driver in drivers:
        driver.kill()
        driver.communicate()
    for pid in marked_processes(mark):
        os.kill(pid, signal.SIGKILL)


def read_until(driver: subprocess.Popen[str], words: str) -> list[str]:
    """The lines that the driver printed up to the first one with these words."""
    assert driver.stdout
    lines = []
    for line in driver.stdout:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError(driver.stderr and driver.stderr.read())


def survivors(mark: str) -> list[int]:
    deadline = time.monotonic() + GONE_WITHIN_S
    while (pids := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return pids


def test_ctrl_c_has_all_workers_commit_and_leave(start: Start, mark: str, tmp_path: Path) -> None:
    driver = start(tmp_path, 100000, 0.02)
    read_until(driver, "step 5")
    os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=40)
    assert driver.returncode == 75, errors
    assert errors == ""
    assert (tmp_path / "stopped-0").exists()
    assert (tmp_path / "stopped-1").exists()
    steps = [step for step, _ in history(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert [event["kind"] for event in read_events(tmp_path / "events.jsonl")] == ["start", "ready", "stop", "end"]
    assert survivors(mark) == []


def test_sigterm_to_every_process_of_a_run_means_a_commit(start: Start, mark: str, tmp_path: Path) -> None:
    """So do a Slurm step, a container and systemd stop. Slurm's TMPDIR may be too long for Ray's sockets, besides."""
    long = tmp_path / ("job-" + 100 * "1")
    long.mkdir()
    driver = start(tmp_path, 100000, 0.02, TMPDIR=str(long), RAY_ADDRESS="local")
    read_until(driver, "step 5")
    for pid in marked_processes(mark):
        os.kill(pid, signal.SIGTERM)
    _, errors = driver.communicate(timeout=40)
    assert driver.returncode == 75, errors
    assert errors == ""
    assert (tmp_path / "stopped-0").exists()
    assert (tmp_path / "stopped-1").exists()
    kinds = [event["kind"] for event in read_events(tmp_path / "events.jsonl")]
    # The workers may have ended before the driver could tell them to.
    assert [kind for kind in kinds if kind != "stop"] == ["start", "ready", "end"]
    assert survivors(mark) == []


def count_events(folder: Path, *kinds: str) -> int:
    events = folder / "events.jsonl"
    return sum(event["kind"] in kinds for event in read_events(events)) if events.exists() else 0


def commands(mark: str) -> dict[int, str]:
    return {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in marked_processes(mark)}


def test_a_local_ray_that_breaks_is_replaced(start: Start, mark: str, tmp_path: Path) -> None:
    """Any part of it, one after the other."""
    victims = {
        "raylet": "/raylet/raylet\0",
        "gcs_server": "/gcs_server\0",
        "keeper": "moray.cluster.ray.keeper",
    }
    driver = start(tmp_path, 100_000, 0.02)
    told = []
    for number, words in enumerate(victims.values()):
        while count_events(tmp_path, "ready", "recovered") == number:
            told += read_until(driver, "rank ")
        (pid,) = [pid for pid, command in commands(mark).items() if words in command]
        os.kill(pid, signal.SIGKILL)
    while count_events(tmp_path, "recovered") < len(victims):
        told += read_until(driver, "rank ")
    driver.terminate()
    rest, errors = driver.communicate(timeout=40)
    assert (driver.returncode, errors) == (75, "")
    told += rest.splitlines()
    assert all(f"{driver.pid} " in line for line in told), "Ray has no say in a user's terminal"
    steps = [step for step, _ in history(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert {generation for _, generation in history(tmp_path)} == {1, 2, 3, 4}
    events = [event for event in read_events(tmp_path / "events.jsonl") if event["kind"] != "stop"]
    assert [event["kind"] for event in events] == ["start", "ready", *["fault", "start", "recovered"] * 3, "end"]
    reasons = [event["reason"] for event in events if event["kind"] == "fault"]
    assert reasons == [f"the local Ray was lost: its {victim} was killed by SIGKILL" for victim in victims]
    assert survivors(mark) == []


def test_a_second_ctrl_c_does_not_wait_for_the_step(start: Start, mark: str, tmp_path: Path) -> None:
    driver = start(tmp_path, 100000, 1000.0)
    read_until(driver, "step 1")
    os.killpg(driver.pid, signal.SIGINT)
    time.sleep(1)
    assert driver.poll() is None
    os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=40)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert survivors(mark) == []


def test_a_killed_driver_leaves_nothing_and_the_same_command_resumes(start: Start, mark: str, tmp_path: Path) -> None:
    """Until it gets a SIGTERM, the driver alone."""
    driver = start(tmp_path, 100000, 0.02)
    read_until(driver, "step 10")
    driver.kill()
    driver.wait()
    assert survivors(mark) == []
    done = len(history(tmp_path))
    again = start(tmp_path, 100000, 0.02)
    read_until(again, f"step {done + 5}")
    again.terminate()
    _, errors = again.communicate(timeout=40)
    assert (again.returncode, errors) == (75, "")
    steps = [step for step, _ in history(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= done + 5
    assert {generation for _, generation in history(tmp_path)} == {1, 2}
    assert survivors(mark) == []
