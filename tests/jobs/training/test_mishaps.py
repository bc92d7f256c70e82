"""What people and disks do to a run's folder while it trains, and between two starts: it goes on, or says why not.

The truth is the run that nobody touched.
"""

import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny

from moray import UserError
from moray.cluster.events import read_events
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.config.run import RunConfig
from moray.jobs.runs.checkpoints import show_checkpoints
from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.runs.watcher import Listener
from moray.jobs.training.drive import drive
from moray.jobs.training.metrics import read_metrics
from moray.parallel.checkpoint.commits import list_commits, verify

STEPS = 16


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def config_of(dataset: Path, run: Path, **changes: object) -> RunConfig:
    plan = {"train__steps": STEPS, "train__eval_every": 0, "checkpoint__every": 2, "checkpoint__keep": 3, **changes}
    return load_config(*parse_settings(tiny(dataset, run, **plan)))


class At(Listener):
    """Does something between two steps, in the process that trains."""

    def __init__(self, **deeds: Callable[[], object]) -> None:
        self._deeds = {int(step.removeprefix("step_")): deed for step, deed in deeds.items()}

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        if deed := self._deeds.pop(step, None):
            deed()


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


@pytest.fixture(scope="module")
def untouched(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "untouched"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert drive(config_of(dataset, run), Console(quiet=True)) == 0
    return run


def remove(folder: Path) -> None:
    while folder.exists():  # a commit may just be written
        shutil.rmtree(folder, ignore_errors=True)


def test_checkpoints_removed_while_running_are_made_again(dataset: Path, untouched: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert drive(config_of(dataset, run), Console(quiet=True), At(step_7=lambda: remove(run / "checkpoints"))) == 0
    commits = list_commits(run / "checkpoints")
    assert [commit.step for commit in commits] == [12, 14, 16]
    assert not any(verify(commit) for commit in commits)
    assert ledger_problems(run) == []
    assert losses(run) == losses(untouched)


def wait_for_commits() -> None:
    for thread in threading.enumerate():
        if thread.name == "commit":
            thread.join()


def test_a_disk_that_is_full_for_a_while_delays_commits_and_lines_alone(
    dataset: Path, untouched: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not a byte can be written in steps 6 to 11, and the steps go on."""
    run, ballast, console = small_disk / "run", small_disk / "ballast", Console(file=io.StringIO())

    def fill() -> None:
        wait_for_commits()
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))

    def free() -> None:
        wait_for_commits()
        ballast.unlink()
        console.print("free again")

    assert drive(config_of(dataset, run, checkpoint__keep=9), console, At(step_5=fill, step_11=free)) == 0
    kinds = {event["step"]: event["kind"] for event in read_events(run / "events.jsonl") if event.get("step")}
    assert kinds == {step: "commit_failed" if step in (6, 8, 10) else "commit" for step in range(2, STEPS + 1, 2)}
    assert isinstance(console.file, io.StringIO)
    told = console.file.getvalue()
    for step in (6, 8, 10):
        assert told.count(f"step {step} was not committed: rank 0: OSError: [Errno 28] No space left on device") == 1
    assert told.index("was not committed") < told.index("free again"), "while there is time to act"
    assert "Traceback" not in told + capfd.readouterr().err
    assert [commit.step for commit in list_commits(run / "checkpoints")] == [2, 4, 12, 14, 16]
    assert ledger_problems(run) == []
    assert losses(run) == losses(untouched)
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, STEPS + 1))
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(losses(run))


def test_a_run_whose_folder_is_removed_ends_in_one_line(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError) as end:
        drive(config_of(dataset, run), Console(quiet=True), At(step_7=lambda: remove(run)))
    assert str(end.value).startswith(f"run.dir={run} was removed, or its disk unmounted, while the run was writing")
    assert "\n" not in str(end.value)
    assert not run.exists(), "a folder without commits, data and settings would look like a run"


def test_metrics_removed_while_running_lack_what_was_in_them(dataset: Path, untouched: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert drive(config_of(dataset, run), Console(quiet=True), At(step_7=(run / "metrics.jsonl").unlink)) == 0
    assert losses(run) == losses(untouched)[7:]
    assert ledger_problems(run) == ["steps 1 to 7 are committed, but metrics.jsonl has no lines of them"]


@pytest.fixture(scope="module")
def half(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which half the steps are committed, as it lay before somebody came."""
    run = tmp_path_factory.mktemp("runs") / "half"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        listener = At(step_7=lambda: os.kill(os.getpid(), 15))
        assert drive(config_of(dataset, run), Console(quiet=True), listener) == 75
    return run


def spoil(run: Path, what: str) -> None:
    metrics, events = run / "metrics.jsonl", run / "events.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    if what == "removed":
        metrics.unlink()
    elif what == "cut":
        metrics.write_bytes(b"".join(lines[:3]) + lines[3][:50])
    elif what == "not UTF-8":
        metrics.write_bytes(b"".join([*lines[:4], lines[4].replace(b'"step"', b'"st\xffp"'), *lines[5:]]))
    elif what == "no rows":
        strange = [
            b"[1]\n",
            b'{"step": "5"}\n',
            b'{"resumed_from": "0"}\n',
            b'{"step": 5, "generation": "2"}\n',
            b"{}\n",
        ]
        metrics.write_bytes(b"".join(lines + strange))
    else:
        strange = [{"kind": "commit", "step": 8, "generation": "2"}, {"kind": "resume"}, {"generation": "9"}, [1]]
        with open(events, "a") as file:
            file.writelines(json.dumps(event) + "\n" for event in strange)


@pytest.mark.parametrize(
    ("what", "lacking"),
    [
        ("removed", "steps 1 to 8 are committed, but metrics.jsonl has no lines of them"),
        ("cut", "steps 4 to 8 are committed, but metrics.jsonl has no lines of them"),
        ("not UTF-8", "step 5 is committed, but metrics.jsonl has no line of it"),
        ("no rows", ""),
        ("strange events", ""),
    ],
)
def test_a_spoilt_history_is_told_and_stops_no_resume(
    dataset: Path,
    untouched: Path,
    half: Path,
    tmp_path: Path,
    what: str,
    lacking: str,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(half, run)
    spoil(run, what)
    told, shown = Console(file=io.StringIO()), Console(file=io.StringIO())
    assert drive(config_of(dataset, run), told) == 0
    there = {row["step"]: row["loss"] for row in read_metrics(run)}
    assert [there[step] for step in range(9, STEPS + 1)] == losses(untouched)[8:]
    assert ledger_problems(run) == ([lacking] if lacking else [])
    assert show_checkpoints(run, check=True, console=shown) == 0
    for console, line in (
        (told, f"run.dir={run}: {lacking}; this changes nothing in what the run computes"),
        (shown, f"{run}: {lacking}"),
    ):
        assert isinstance(console.file, io.StringIO)
        lines = console.file.getvalue().splitlines()
        assert (line in lines) if lacking else not any("metrics.jsonl" in other for other in lines)
