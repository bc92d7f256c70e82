"""Two attempts at one run, on storage where files cannot be locked: the newer one goes on, and the older one says so.

flock answers ENOLCK, as many network file systems do; all else is real.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tiny
from without_locks import WITHOUT_LOCKS, assert_one_chain

from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.training.metrics import read_metrics

ENDLESS = {"train__steps": 100_000, "train__eval_every": 0, "checkpoint__every": 5, "checkpoint__keep": 60}


class Attempts:
    def __init__(self) -> None:
        self.started: list[subprocess.Popen[str]] = []

    def start(self, data: Path, run: Path, **changes: object) -> subprocess.Popen[str]:
        words = tiny(data, run, **{**ENDLESS, **changes})
        command = [sys.executable, "-c", WITHOUT_LOCKS, "pretrain", *words]
        self.started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return self.started[-1]


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Attempts]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    attempts = Attempts()
    yield attempts
    for process in attempts.started:
        process.kill()
        process.communicate()


def wait_until(run: Path, rows: int, *processes: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 50
    while len(read_metrics(run)) < rows:
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes)
        assert_one_chain(run)
        time.sleep(0.1)


def test_the_newer_attempt_goes_on_and_the_older_one_says_so(attempts: Attempts, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    older = attempts.start(dataset, run, optimizer__lr=1e-3)
    wait_until(run, 10, older)
    newer = attempts.start(dataset, run, optimizer__lr=1e-4)
    _, said = older.communicate(timeout=50)
    assert older.returncode == 76, said
    assert "lies where files cannot be locked (No locks available)" in said
    last = said.splitlines()[-1]
    assert last.startswith(f"generation 1 was taken over by generation 2 (pid {newer.pid} on ")
    assert last.endswith("this one has written nothing since, and ends")
    wait_until(run, len(read_metrics(run)) + 10, newer)
    newer.send_signal(signal.SIGTERM)
    _, said = newer.communicate(timeout=50)
    assert newer.returncode == 75, said
    assert_one_chain(run)
    assert ledger_problems(run) == []
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    generations = [row["generation"] for row in rows]
    assert generations == sorted(generations)
    assert set(generations) == {1, 2}


def test_three_that_start_at_once_are_one_history(attempts: Attempts, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for _ in range(3):
        attempts.start(dataset, run)
    until = time.monotonic() + 50
    while sum(process.poll() is None for process in attempts.started) > 1:
        assert time.monotonic() < until
        assert_one_chain(run)
        time.sleep(0.1)
    (survivor,) = (process for process in attempts.started if process.returncode is None)
    wait_until(run, len(read_metrics(run)) + 10, survivor)
    survivor.send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=50)[1] for process in attempts.started]
    assert sorted(process.returncode for process in attempts.started) == [75, 76, 76], "\n".join(said)
    assert_one_chain(run)
    assert ledger_problems(run) == []
