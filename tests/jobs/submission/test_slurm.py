"""What `moray submit --to slurm` writes and refuses; test_slurm_jobs.py runs it."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny


@pytest.fixture
def show(dataset: Path, tmp_path: Path, moray: Callable[..., Any]) -> Callable[..., Any]:
    """`moray submit --to slurm --print` with these options of its own."""

    def run(*options: str, **settings: object) -> Any:
        words = tiny(dataset, tmp_path / "run", **{"cluster__launcher": "ray", "train__global_batch": 48, **settings})
        return moray("submit", "--to", "slurm", "--print", *options, "--", "pretrain", *words)

    return run


def options_of(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_a_script_for_a_ray_of_its_own(show: Callable[..., Any], tmp_path: Path) -> None:
    words = ["--nodes", "2", "--time", "1-12", "--partition", "long", "--account", "me", "--cpus-per-worker", "6"]
    outcome = show(*words, "--sbatch", "--qos=high --exclusive", cluster__workers=8, cluster__device="cuda")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "run").exists()
    found = options_of(outcome.out)
    expected = {
        "--nodes": "2",
        "--ntasks-per-node": "1",
        "--cpus-per-task": "24",
        "--gpus-per-node": "4",
        "--time": "1-12",
        "--partition": "long",
        "--account": "me",
        "--qos": "high",
        "--exclusive": "",
        "--requeue": "",
        "--open-mode": "append",
        "--signal": "B:TERM@120",
        "--output": f"{tmp_path}/run/submit/slurm.log",
    }
    assert {name: found.get(name) for name in expected} == expected
    assert "RAY_ADDRESS=slurm" in outcome.out


def test_a_script_for_tasks_of_srun(show: Callable[..., Any]) -> None:
    outcome = show("--nodes", "2", cluster__workers=8, cluster__launcher="slurm", cluster__device="cpu")
    found = options_of(outcome.out)
    assert (found["--ntasks-per-node"], found["--cpus-per-task"]) == ("4", "1")
    assert not {"--gpus-per-node", "--time", "--partition", "--account"} & {*found}
    assert "RAY" not in outcome.out


@pytest.mark.parametrize("launcher", ["ray", "slurm"])
def test_a_script_is_one_of_bash(show: Callable[..., Any], tmp_path: Path, launcher: str) -> None:
    """In a folder whose name has what shells and sbatch read as something else."""
    outcome = show(cluster__launcher=launcher, run__dir=tmp_path / 'it\'s "100%" #1 $run')
    script = outcome.out[outcome.out.index("#!/bin/bash") :]
    log = f'{tmp_path}/it\'s \\"100%%\\" #1 $run/submit/slurm.log'
    assert options_of(script)["--output"] == f'"{log}"'
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_large_model_is_told_early(show: Callable[..., Any]) -> None:
    """4 bytes of weights and 8 of AdamW for each parameter, at 500 MB/s."""
    width = 2**21
    outcome = show(model__ffn__width=width)
    n_parameters = 3 * 32 * width  # but for what tiny has beside its one dense layer
    told_s = int(options_of(outcome.out)["--signal"].partition("@")[2])
    assert told_s == pytest.approx(120 + 12 * n_parameters / 500e6, abs=1)  # 125


@pytest.mark.parametrize(
    ("options", "settings", "complaint"),
    [
        ([], {"cluster__launcher": "local"}, "cluster.launcher=local must be ray (a Ray of the job's own) or slurm"),
        (["--nodes", "0"], {}, "--nodes 0 must be at least 1"),
        (["--nodes", "2"], {"cluster__workers": 3}, "cluster.workers=3 must be a multiple of --nodes 2"),
        (["--gpus-per-node", "2"], {"cluster__workers": 3}, "--gpus-per-node 2 must be at least 3"),
        (["--time", "3"], {}, "--time 3 is too short: to start and to commit, this run needs 4 minutes"),
        (["--time", "3:59"], {}, "--time 3:59 is too short"),
        (["--time", "0:3:59"], {}, "--time 0:3:59 is too short"),
        (["--sbatch", "--qos long"], {}, "--sbatch --qos long: long is no option; write each as --name=value"),
        (["--sbatch", "--comment='x"], {}, "--sbatch --comment='x: No closing quotation"),
        (["--time", "tomorrow"], {}, "--time tomorrow is no time limit; choose minutes, hours:minutes:seconds"),
    ],
)
def test_what_could_not_run(
    show: Callable[..., Any], options: list[str], settings: dict[str, Any], complaint: str
) -> None:
    outcome = show(*options, **settings)
    assert outcome.code == 2
    assert complaint in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("limit", ["4", "4:00", "0:4:0", "0-1", "0-0:4", "0-0:4:0", "UNLIMITED"])
def test_time_limits_that_suffice(show: Callable[..., Any], limit: str) -> None:
    assert show("--time", limit).code == 0


def test_without_slurm(
    dataset: Path, tmp_path: Path, moray: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = moray(
        "submit", "--to", "slurm", "--", "pretrain", *tiny(dataset, tmp_path / "run", cluster__launcher="ray")
    )
    assert outcome.code == 2
    assert "sbatch is not here; submit where Slurm's commands are (Debian: apt install slurm-client)" in outcome.err


def test_the_page(moray: Callable[..., Any], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command is one that is accepted; test_slurm_jobs.py stops jobs in the way that it names."""
    page = (Path(__file__).parents[3] / "docs" / "launching" / "slurm.md").read_text()
    (line,) = {line.strip() for line in page.splitlines() if line.startswith("    moray submit --to slurm")}
    (tmp_path / "data").symlink_to(dataset)
    monkeypatch.chdir(tmp_path)
    outcome = moray(*line.replace(" -- ", " --print -- ").split()[1:])
    assert outcome.code == 0, outcome.err
    assert options_of(outcome.out)["--nodes"] == "2"
    assert "| `scancel --batch --signal=TERM JOB` |" in page
