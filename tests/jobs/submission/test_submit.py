"""What `moray submit` refuses here, and what it writes: no scheduler is asked."""

import json
import threading
import tomllib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from tiny import tiny

from moray.cluster.worker import WorkerError
from moray.jobs.config.load import load_config
from moray.jobs.submission.ray_job import RayJob
from moray.jobs.submission.submit import as_job

Moray = Callable[..., "Outcome"]  # noqa: F821 - of conftest.py
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def words(data: Path, run: Path, **changes: object) -> list[str]:
    return ["--", "pretrain", *tiny(data, run, **{"cluster__launcher": "ray", **changes})]


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ([], "--to is missing: a run can be submitted to ray, slurm, kubernetes"),
        (["--to", "slrum"], "--to slrum: a run can be submitted to ray, slurm, kubernetes"),
        (["--to", "ray", "--adress", "x"], "--adress is not an option of moray submit --to ray; did you mean --addr"),
        (["--to=ray"], "`moray submit` runs a verb that trains, after two dashes: -- pretrain --data.path DATA --run."),
        (["--to=ray", "--", "generate", "runs/first"], "generate is none"),
        (["--to=ray", "--", "pretrain", "--train.step", "3"], "train.step is not a setting; did you mean train.steps"),
        (["--to=ray", "--", "pretrain", "--data.path", "x"], "run.dir is missing"),
    ],
)
def test_words_that_are_no_submission(moray: Moray, own: list[str], line: str) -> None:
    outcome = moray("submit", *own)
    assert outcome.code == 2
    (said,) = outcome.err.splitlines()
    assert line in said


def test_what_pretrain_would_refuse_is_refused_before_anybody_is_asked(
    moray: Moray, dataset: Path, tmp_path: Path
) -> None:
    for changed, line in (
        ({"model__vocab_size": 300}, "set model.vocab_size=400"),
        ({"train__global_batch": 3, "cluster__workers": 2}, "train.global_batch=3 must be a multiple of the 2"),
        ({"cluster__launcher": "local"}, "cluster.launcher=local must be ray in a job of Ray"),
    ):
        outcome = moray("submit", "--to", "ray", "--address", NOWHERE, *words(dataset, tmp_path / "run", **changed))
        assert outcome.code == 2
        assert line in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_print_shows_and_does_nothing(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    submission = ["submit", "--to", "ray", "--address", NOWHERE, "--print", *words(dataset, run, cluster__workers=4)]
    outcome = moray(*submission)
    assert (outcome.code, outcome.err) == (0, "")
    assert list(tmp_path.iterdir()) == []
    recipe, request = outcome.out.split(f"# {run}/submit/ray-job.json\n")
    asked = json.loads(request)
    assert asked["entrypoint"] == "exec moray pretrain --recipe recipe.toml"
    assert asked["runtime_env"] == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}}
    (tmp_path / "recipe.toml").write_text(recipe)
    assert tomllib.loads(recipe)["run"]["dir"] == str(run)
    same = dict(zip(*[iter(word.removeprefix("--") for word in submission[8:])] * 2, strict=True))
    assert load_config(str(tmp_path / "recipe.toml"), {}) == load_config(None, same)


def test_a_server_that_is_not_there(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    outcome = moray("submit", "--to", "ray", "--address", NOWHERE, *words(dataset, tmp_path / "run"))
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"moray: no job server answers at {NOWHERE} (")
    assert line.endswith("give --address, start Ray with `ray start --head` there, or open a tunnel to it")


class DyingServer(BaseHTTPRequestHandler):
    """A job server that tells its version, and hangs up on every other question."""

    def do_GET(self) -> None:
        if self.path == "/api/version":
            told = {"version": "4", "ray_version": version("ray"), "ray_commit": "", "session_name": ""}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(told).encode())

    def log_message(self, *words: object) -> None:
        pass


def test_a_server_that_goes_away_is_no_mistake_of_the_user(dataset: Path, tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), DyingServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = RayJob(address=f"http://127.0.0.1:{server.server_port}")
        job = as_job(target, words(dataset, tmp_path / "run")[1:])
        with pytest.raises(WorkerError, match=r"does not answer any more; `moray status` of the run tells"):
            target.watch(job, "run-1")
        server.shutdown()


class OldServer(BaseHTTPRequestHandler):
    """What the job server of another Ray says of itself."""

    def do_GET(self) -> None:
        told = {"version": "4", "ray_version": "2.49.1", "ray_commit": "", "session_name": ""}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(told).encode())

    def log_message(self, *words: object) -> None:
        pass


def test_another_ray_on_the_other_side(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), OldServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        outcome = moray("submit", "--to", "ray", "--address", url, *words(dataset, tmp_path / "run"))
        server.shutdown()
    assert outcome.code == 2
    assert f"moray: Ray is 2.49.1 at {url}, but {version('ray')} here; install the same on both\n" in outcome.err


@pytest.mark.parametrize("address", ["head:8265", "ftp://head", "http://:8265", "http://head:port", "10.0.0.1:6379"])
def test_an_address_that_is_none(moray: Moray, dataset: Path, tmp_path: Path, address: str) -> None:
    outcome = moray("submit", "--to", "ray", "--address", address, *words(dataset, tmp_path / "run"))
    assert outcome.code == 2
    assert f"--address {address} must be http://HOST:PORT of the job server" in outcome.err


def test_a_run_that_is_done_is_not_submitted(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert moray("pretrain", *tiny(dataset, run, train__steps=2)).code == 0
    outcome = moray("submit", "--to", "ray", "--address", NOWHERE, *words(dataset, run, train__steps=2))
    assert outcome.code == 0
    assert outcome.err == f"run.dir={run} has committed step 2 of train.steps=2: nothing to do\n"


def test_storage_that_is_not_here(moray: Moray, tmp_path: Path) -> None:
    """Nothing is made under the paths of another machine."""
    outcome = moray("submit", "--to", "ray", "--address", NOWHERE, *words(Path("/away/data"), Path("/away/runs/a b")))
    assert outcome.err.startswith("data.path=/away/data is not on this machine: the job itself will see")
    assert {path.name for path in (tmp_path / "a_b-submit").iterdir()} == {"recipe.toml", "ray-job.json"}
    assert not Path("/away").exists()
