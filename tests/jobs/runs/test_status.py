"""`moray status`, from the files that real runs and drivers left, or that were written by hand."""

import io
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import TINY, tiny

from moray.cluster.events import EventLog
from moray.cluster.process import Process
from moray.jobs.config.load import load_config
from moray.jobs.runs.reporter import Reporter, job_ids
from moray.jobs.runs.show_status import show_status
from moray.jobs.runs.status import BEAT_EVERY_S, LOST_AFTER_S, status_of
from moray.jobs.runs.watcher import Listener
from moray.jobs.training.metrics import read_metrics
from moray.parallel.checkpoint.commits import list_commits
from moray.parallel.checkpoint.generations import SupersededError

Moray = Callable[..., Any]
ROW = {"loss": 3.25, "tokens_per_second": 1000.0, "seconds": 0.5}


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moray.jobs.cli import dispatch

    run = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        environment.setenv("SLURM_JOB_ID", "4711")
        assert dispatch(["pretrain", *tiny(dataset, run, train__steps=3, checkpoint__every=2)]) == 0
    return run


def beat(run: Path, **fields: Any) -> Path:
    """A folder with such a status.json; by default that of a driver, this process, which is at work."""
    run.mkdir(parents=True, exist_ok=True)
    now = time.time()
    this = {"host": "here", "pid": 1, "kernel": None, "started": None}
    word = {"attempt": "a", "driver": this, "launcher": "ray", "job": {}, "since": now - 600, "time": now, "steps": 100}
    (run / "status.json").write_text(json.dumps(word | fields))
    return run


def driver(process: Process) -> dict[str, Any]:
    return {name: getattr(process, name) for name in ("host", "pid", "kernel", "started")}


def reporter(run: Path, **changes: object) -> Reporter:
    settings = {**TINY, "data.path": "d", "run.dir": run, "train.steps": 100, **changes}
    return Reporter(load_config(None, {name: str(value) for name, value in settings.items()}), Listener())


def test_a_run_that_is_done(moray: Moray, finished: Path) -> None:
    outcome = moray("status", finished, "--json", "--exit-code")
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    rows, commit = read_metrics(finished), list_commits(finished / "checkpoints")[-1]
    assert (found["state"], found["why"], found["step"], found["steps"]) == ("done", None, 3, 3)
    assert found["loss"] == rows[-1]["loss"]
    assert (found["commit_step"], found["launcher"], found["job"]) == (commit.step, "local", {"slurm": "4711"})
    assert (found["workers"], found["generation"], found["faults"], found["steps_again"]) == (1, 1, 0, 0)
    assert 0 <= found["commit_seconds_ago"] < 600
    shown = moray("status", finished).out.splitlines()
    assert shown[0].split() == ["run", str(finished)]
    assert any(line.startswith("step     3 of 3") for line in shown)
    assert any("launcher local, slurm job 4711" in line for line in shown)


@pytest.mark.parametrize(
    ("fields", "state", "code"),
    [
        ({}, "running", 3),
        ({"code": 0}, "done", 0),
        ({"code": 1, "why": "rank 3: out of memory"}, "failed", 1),
        ({"code": 2, "why": "run.dir=x is full"}, "failed", 1),
        ({"code": 75}, "stopped", 75),
        ({"code": 130, "why": "KeyboardInterrupt"}, "stopped", 75),
        ({"code": 76}, "superseded", 76),
        ({"time": time.time() - LOST_AFTER_S - 900}, "lost", 75),
    ],
)
def test_a_script_asks_for_the_state(moray: Moray, tmp_path: Path, fields: dict, state: str, code: int) -> None:
    outcome = moray("status", beat(tmp_path / "run", **fields), "--json", "--exit-code")
    assert outcome.code == code
    found = json.loads(outcome.out)
    assert found["state"] == state
    if state == "failed":
        assert found["why"] == fields["why"]


def test_a_driver_that_is_gone_without_a_word(tmp_path: Path) -> None:
    """Of this machine at once; of another one, or of this one before its reboot, once it has been silent for long."""
    process = subprocess.Popen(["sleep", "60"])
    stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    here = Process.this()
    there = {**driver(here), "pid": process.pid, "started": int(stat[19])}
    run = beat(tmp_path, driver=there, time=time.time() - 9000)
    try:
        assert status_of(run).state == "running", "however old its word: it may have no disk to write it on"
    finally:
        process.kill()
        process.wait()
    found = status_of(beat(tmp_path, driver=there))
    assert (found.state, found.exit_code) == ("lost", 75)
    assert found.why == f"its driver, pid {process.pid} on {here.host}, is gone, without a word"
    rebooted = {**there, "kernel": "the boot before"}
    assert status_of(beat(tmp_path, driver=rebooted)).state == "running"
    assert status_of(beat(tmp_path, driver=rebooted, time=time.time() - LOST_AFTER_S - 1)).state == "lost"


def test_a_run_killed_after_its_last_commit_is_done(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "status.json").unlink()
    assert status_of(run).state == "done"
    assert status_of(run).step == 3
    shutil.rmtree(run / "checkpoints" / "step-000000003")
    found = status_of(run)
    assert (found.state, found.why, found.commit_step) == ("lost", "its driver has left no status.json", 2)


def test_what_faults_cost(tmp_path: Path) -> None:
    """Two faults on Ray, the second never recovered; one restart by torchrun; steps 101-142 and 111-120 undone."""
    run, log = beat(tmp_path), EventLog(tmp_path / "events.jsonl")
    log.write("ready", seconds=9.0)
    log.write("fault", rank=3, node="n2", reason="was killed\nby SIGKILL")
    log.write("recovered", seconds=2.5)
    log.write("recovered", seconds=4.0)
    log.write("fault", rank=None, node=None, reason="the local Ray was lost")
    log.write("ready", seconds=7.0)
    steps = [*range(1, 143), -100, *range(101, 121), -110, *range(111, 115)]
    lines = [{"resumed_from": -step, "generation": 2} if step < 0 else {"step": step, "loss": 2.0} for step in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 11')
    found = status_of(run)
    assert (found.faults, found.fault_seconds, found.steps_again, found.step) == (3, 6.5, 42 + 10, 114)
    assert found.last_fault == "the local Ray was lost"
    shown = io.StringIO()
    show_status([run], watch=False, as_json=False, console=Console(file=shown, width=80))
    assert "faults   3: 6.5 s until all were at work again, 52 steps computed again" in shown.getvalue()


def test_what_this_attempt_does_without(tmp_path: Path) -> None:
    run, log = beat(tmp_path), EventLog(tmp_path / "events.jsonl")
    log.write("node_set_aside", node="n2", node_id="f00", why="it computed wrongly")
    log.write("node_kept", node="n3", node_id="f01", why="ranks 0-1 failed there within an hour")
    assert status_of(run).set_aside == ("n2: it computed wrongly",)
    shown = io.StringIO()
    show_status([run], watch=False, as_json=False, console=Console(file=shown, width=80))
    assert "aside    node n2: it computed wrongly\n" in shown.getvalue()
    beat(tmp_path, since=time.time() + 1)
    assert status_of(run).set_aside == (), "another attempt takes what it gets"


def test_who_is_slow_now(tmp_path: Path) -> None:
    run, log = beat(tmp_path), EventLog(tmp_path / "events.jsonl")
    slow = {"rank": 5, "node": "n2", "own_seconds": 2.0}
    for kind, fields, expected in (
        ("start", {}, ()),
        ("straggler", {"step": 150, "ranks": [slow]}, ("rank 5 on n2",)),
        ("commit", {"step": 160}, ("rank 5 on n2",)),
        ("straggler", {"step": 200, "ranks": []}, ()),
        ("straggler", {"step": 250, "ranks": [slow]}, ("rank 5 on n2",)),
    ):
        log.write(kind, **fields)
        assert status_of(run).stragglers == expected
    shown = io.StringIO()
    show_status([run], watch=False, as_json=False, console=Console(file=shown, width=80))
    assert "slow     rank 5 on n2: the others wait at each step" in shown.getvalue()
    log.write("start")
    assert status_of(run).stragglers == (), "another generation begins with none"


def test_json_is_json_whatever_the_files_hold(moray: Moray, tmp_path: Path) -> None:
    run = beat(tmp_path / "run", loss=float("nan"))  # no status.json that can be believed
    (run / "events.jsonl").write_text('[1]\n{"kind": "recovered", "seconds": Infinity}\n{"kind"')
    (run / "metrics.jsonl").write_text('{"step": 5, "loss": NaN}\n')
    (run / "checkpoints" / "step-000000001").mkdir(parents=True)
    (run / "checkpoints" / "step-000000001" / "manifest.json").write_text("{}")
    (run / "config.toml").write_text("[train\n")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    outcome = moray("status", run, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out, parse_constant=refuse)
    assert (found["state"], found["step"], found["loss"], found["commit_step"]) == ("lost", 5, None, None)


def test_the_runs_below_a_folder(moray: Moray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "a-name-that-takes-all-of-a-terminal-" * 3
    for name in ("runs/b", f"runs/deep/{long}", "runs/.hidden", "elsewhere/c"):
        beat(tmp_path / name, step=120_000, steps=1_000_000, loss=10.25, tokens_per_second=1_234_567.8)
    (tmp_path / "runs" / "b" / "inner" / "status.json").parent.mkdir()
    (tmp_path / "runs" / "b" / "inner" / "status.json").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    header, *lines = moray("status").out.splitlines()
    assert lines[::2] == ["runs/b", f"runs/deep/{long}"]
    assert max(map(len, [header, *lines[1::2]])) <= 80
    assert lines[1].split() == ["running", "120000/1000000", "10.250", "1,234,568", "-", "-", "0"]
    assert len(moray("status", "runs", "elsewhere", "--json").out.splitlines()) == 3
    assert moray("status", "runs", "--exit-code").err.startswith(
        "moray: --exit-code is that of one run, and here are 2"
    )


def test_no_such_run(moray: Moray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, said in (
        ([], "runs does not exist; name the folder of a run"),
        ([tmp_path / "none", "--exit-code"], f"{tmp_path}/none does not exist; name the folder"),
        ([tmp_path], f"{tmp_path} holds no run; name the folder"),
    ):
        outcome = moray("status", *arguments)
        assert outcome.code == 2
        assert outcome.err.startswith(f"moray: {said}")


def test_watching_ends_with_the_run(tmp_path: Path) -> None:
    """It stands in place on the screen, and the last that is seen is how the run ended."""
    process = subprocess.Popen(["sleep", "1.5"])
    stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    beat(tmp_path, driver={**driver(Process.this()), "pid": process.pid, "started": int(stat[19])})
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)
    (last,) = show_status([tmp_path], watch=True, as_json=False, console=screen)
    process.wait()
    assert last.state == "lost"
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    assert shown.index("state    running") < shown.index("\x1b[2K") < shown.index("state    lost")


def test_status_imports_no_torch(finished: Path) -> None:
    script = "import sys; from moray.jobs.cli import dispatch; dispatch(['status', sys.argv[1]])"
    script += "; print(sorted({'torch', 'ray', 'tensorboard'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script, str(finished)], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_driver_keeps_saying_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moray.jobs.runs.reporter.BEAT_EVERY_S", BEAT_EVERY_S / 100)
    with reporter(tmp_path) as driver:
        assert status_of(tmp_path).state == "running", "from the first moment"
        driver.on_event("start", {"generation": 4, "workers": 2, "ranks": [{"node": "n1"}, {"node": "n2"}]})
        for step in (7, 8):
            driver.on_status(0, step, ROW)
        driver.on_status(1, 9, {})
        until = time.monotonic() + 30
        while status_of(tmp_path).step != 8:
            assert time.monotonic() < until
        found = status_of(tmp_path)
        assert (found.generation, found.nodes, found.loss, found.tokens_per_second) == (4, ("n1", "n2"), 3.25, 1000.0)
        word = json.loads((tmp_path / "status.json").read_text())
        assert found.seconds_left == pytest.approx((100 - 8) * word["seconds_per_step"])
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_how_it_ended_is_the_last_that_a_driver_says(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), reporter(tmp_path):
        raise RuntimeError("rank 3 was killed; the restarts are spent\nTraceback of no interest")
    found = status_of(tmp_path)
    assert (found.state, found.why) == ("failed", "rank 3 was killed; the restarts are spent")
    with reporter(tmp_path) as driver:
        driver.on_event("end", {"code": 75})
    assert status_of(tmp_path).state == "stopped"
    with pytest.raises(SupersededError), reporter(tmp_path):
        raise SupersededError("generation 2 has taken over")
    assert (status_of(tmp_path).state, status_of(tmp_path).exit_code) == ("superseded", 76)


def test_an_attempt_that_was_overtaken_is_silent(tmp_path: Path) -> None:
    with reporter(tmp_path), reporter(tmp_path) as newer:
        newer.on_event("end", {"code": 75})
    assert status_of(tmp_path).state == "stopped"


def test_neither_a_full_disk_nor_a_missing_folder_ends_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with reporter(run):
        before = (run / "status.json").read_text()
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            with reporter(run):
                pass
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path.name for path in run.iterdir()] == ["status.json"]
        assert (run / "status.json").read_text() == before
        shutil.rmtree(run)
    assert not run.exists()


def test_the_ids_of_schedulers() -> None:
    submitted = json.dumps(
        {"runtime_env": {"env_vars": {"KEY": "secret"}}, "metadata": {"job_submission_id": "raysub"}}
    )
    assert job_ids({"RAY_JOB_CONFIG_JSON_ENV_VAR": submitted, "SLURM_JOB_ID": "7"}) == {"ray": "raysub", "slurm": "7"}
    assert job_ids({"RAY_JOB_ID": "01000000", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}) == {"ray": "01000000"}
    assert job_ids({"PATH": "/bin"}) == {}
