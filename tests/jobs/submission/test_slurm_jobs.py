"""`moray submit --to slurm` on a real Slurm of two nodes: stopped jobs commit, go back into the queue, and go on."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from nodes_of_one import SmallNode
from rich.console import Console
from slurm_of_two import slurm
from tiny import tiny

from moray.cluster.events import read_events
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.runs.status import status_of
from moray.jobs.training.drive import drive
from moray.jobs.training.metrics import read_metrics
from moray.parallel.checkpoint.commits import list_commits

STEPS = 50
# Nothing is committed but at a stop and at the end.
ON_TWO = {"cluster__workers": 2, "train__steps": STEPS, "train__eval_every": 0, "checkpoint__every": STEPS}
WAIT_S = 100


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallNode]:
    """The first of Slurm's two nodes. Each has a /tmp/ray of its own; the rest of the files is shared."""
    with slurm(tmp_path_factory.mktemp("slurm")) as node, pytest.MonkeyPatch.context() as environment:
        environment.setenv("TMPDIR", "/tmp/ray")
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        yield node


@pytest.fixture(scope="module")
def untouched(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    run = tmp_path_factory.mktemp("untouched") / "run"
    config = load_config(*parse_settings(tiny(dataset, run, **ON_TWO, cluster__launcher="ray")))
    assert drive(config, Console(quiet=True)) == 0
    return computed(run)


def computed(run: Path) -> list[Any]:
    return [(row["step"], row["positions"], row["loss"], row["grad_norm"]) for row in read_metrics(run)]


@contextmanager
def followed(node: SmallNode, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`moray submit --to slurm --follow …` on the node."""
    command = node.beside(sys.executable, "-m", "moray", "submit", "--to", "slurm", "--follow", *words)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ask(node: SmallNode, *command: str) -> str:
    return subprocess.run(node.beside(*command), check=True, capture_output=True, text=True).stdout.strip()


def wait_until(holds: Callable[[], bool], run: Path) -> None:
    until = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < until, log_of(run).read_text() if log_of(run).exists() else "no log"
        time.sleep(0.05)


def has_rows(run: Path, n_rows: int) -> bool:
    return len(read_metrics(run)) >= n_rows


def log_of(run: Path) -> Path:
    return run / "submit" / "slurm.log"


def job_of(run: Path) -> str:
    return status_of(run).job["slurm"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("launcher", ["ray", "slurm"])
def test_a_job_that_is_told_of_its_end_commits_and_goes_on(
    node: SmallNode, dataset: Path, tmp_path: Path, untouched: list[Any], launcher: str
) -> None:
    """What Slurm sends before the time limit, sent by hand."""
    run = tmp_path / "run"
    settings = tiny(dataset, run, **ON_TWO, cluster__launcher=launcher)
    with followed(node, "--nodes", "2", "--time", "10", "--", "pretrain", *settings) as job:
        wait_until(partial(has_rows, run, 10), run)
        ask(node, "scancel", "--batch", "--signal=TERM", job_of(run))
        said, _ = job.communicate(timeout=WAIT_S)
    assert job.returncode == 0, said
    assert computed(run) == untouched
    stopped, end = list_commits(run / "checkpoints")
    assert (10 <= stopped.step < STEPS, end.step) == (True, STEPS)
    (resumed,) = (event for event in read_events(run / "events.jsonl") if event["kind"] == "resume")
    assert resumed["step"] == stopped.step
    # One log of both attempts: the file, and what was shown of it.
    log = log_of(run).read_text()
    assert said.endswith(log)
    assert log.count("stopped on request; what was done is committed") == log.count(f"step {STEPS}/{STEPS} ") == 1


@pytest.mark.timeout(300)
def test_of_two_jobs_on_a_node_one_is_cancelled(node: SmallNode, dataset: Path, tmp_path: Path) -> None:
    """It commits, stays stopped and leaves nothing behind; the other's Ray, beside its own, does not notice."""
    first, second = tmp_path / "first", tmp_path / "second"
    endless = {"train__steps": 100_000, "train__eval_every": 0, "checkpoint__every": 100_000}
    with ExitStack() as following:
        jobs = []
        name = 'it\'s "100%" of #1'
        for run in (first, second):
            settings = tiny(dataset, run, **endless, cluster__launcher="ray")
            words = ["--name", name, "--sbatch", f"--nodelist={node.name}", "--", "pretrain", *settings]
            jobs.append(following.enter_context(followed(node, *words)))
            wait_until(partial(has_rows, run, 5), run)
        (token,) = (first / "submit").glob(".token-*")
        assert (token.stat().st_mode & 0o777, len(token.read_text())) == (0o600, 64)

        ask(node, "scancel", job_of(first))
        assert jobs[0].wait(WAIT_S) == 75
        assert ask(node, "squeue", "--noheader", "--format=%i %j") == f"{job_of(second)} {name}"
        (commit,) = list_commits(first / "checkpoints")
        assert commit.step == len(read_metrics(first))
        assert not token.exists()
        wait_until(partial(has_rows, second, len(read_metrics(second)) + 5), second)
        places = ask(node, "srun", "--overlap", f"--jobid={job_of(second)}", "ls", "/tmp/ray").split()
        assert [place for place in places if place.startswith("moray")] == [f"moray-{job_of(second)}"]

        again = [sys.executable, "-m", "moray", "submit", "--to", "slurm", *words]
        refused = subprocess.run(node.beside(*again), capture_output=True, text=True)
        assert refused.returncode == 2
        assert f"Slurm job {job_of(second)} of this run has not ended: `scancel" in refused.stderr

        ask(node, "scancel", job_of(second))
        assert jobs[1].wait(WAIT_S) == 75
        assert [status_of(run).exit_code for run in (first, second)] == [75, 75]


@pytest.mark.parametrize(
    ("n_tasks", "mistake"),
    [(1, "cluster.workers=2 must be the number of srun's tasks, which is 1"), (2, "is a file; name a folder")],
    ids=["of all tasks", "of the first task"],
)
def test_a_mistake_among_tasks(node: SmallNode, dataset: Path, tmp_path: Path, n_tasks: int, mistake: str) -> None:
    """It is told once, and nobody waits for a task that is not to come."""
    run = tmp_path / "run"
    if n_tasks == 2:
        run.touch()
    settings = tiny(dataset, run, cluster__launcher="slurm", cluster__workers=2)
    tasks = ["srun", f"--ntasks={n_tasks}", f"--nodes={n_tasks}", "--kill-on-bad-exit=1"]
    command = node.beside(*tasks, sys.executable, "-m", "moray", "pretrain", *settings)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("moray:") and line.endswith(mistake)]
    assert done.stderr.count("moray: ") == 1


def test_what_sbatch_refuses(node: SmallNode, dataset: Path, tmp_path: Path) -> None:
    settings = tiny(dataset, tmp_path / "run", cluster__launcher="ray")
    with followed(node, "--partition", "nowhere", "--", "pretrain", *settings) as job:
        said, _ = job.communicate(timeout=WAIT_S)
    assert job.returncode == 2
    assert said.count("\n") == 1
    assert "sbatch: error: Batch job submission failed: Invalid partition name specified" in said
