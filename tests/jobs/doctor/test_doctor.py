"""`moray doctor` on this machine, and what several processes find out together."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool

import moray.jobs.doctor.meeting as meeting_module
from moray.jobs.doctor.facts import Question, _look_at, look
from moray.jobs.doctor.meeting import MAX_ROUNDS, meet, rounds

CPU = torch.device("cpu")


def test_a_machine_that_is_fit(moray: Callable[..., Any], dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    outcome = moray("doctor", "--run-dir", run, "--data-path", dataset)
    assert outcome.code == 0, outcome.out
    lines = {line[6:20].strip(): line for line in outcome.out.splitlines()}
    assert lines.keys() >= {"versions", "run.dir", "data.path", "open files", "gpus", "matmul"}
    assert f", python {sys.version.split()[0]}, torch {torch.__version__}, ray " in lines["versions"]
    assert not any(line.startswith("BAD") for line in lines.values())
    assert not (tmp_path / "runs").exists(), "what was made is taken away"
    assert not [path for path in dataset.iterdir() if path.name.startswith(".moray-doctor")]


def test_what_is_to_be_mended_ends_with_1_and_is_in_the_json(moray: Callable[..., Any], tmp_path: Path) -> None:
    outcome = moray("doctor", "--data-path", tmp_path / "nowhere", "--json")
    assert outcome.code == 1
    report = json.loads(outcome.out)
    assert report["is_fit"] is False
    (bad,) = [verdict for verdict in report["verdicts"] if verdict["level"] == "bad"]
    assert bad["check"] == "data.path"
    assert f"not there on {socket.gethostname()}" in bad["says"]
    (facts,) = report["nodes"]
    assert facts["versions"]["torch"] == torch.__version__
    assert 1e9 < facts["peak_flops"] < 1e15


def test_a_run_folder_that_is_a_file_is_a_mistake(moray: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    outcome = moray("doctor", "--run-dir", tmp_path / "run")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"moray: --run-dir={tmp_path / 'run'} is a file; name a folder\n"


def test_what_a_killed_doctor_left_is_removed_once_it_is_old(moray: Callable[..., Any], tmp_path: Path) -> None:
    old, of_another = tmp_path / ".moray-doctor-aa-0", tmp_path / ".moray-doctor-bb-1"
    for mark in (old, of_another):
        mark.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    assert moray("doctor", "--run-dir", tmp_path).code == 0
    assert [*tmp_path.iterdir()] == [of_another]


def looks(folder: str) -> list[bool]:
    return [_look_at(Path(folder), "ab").is_writable for _ in range(300)]


def test_processes_of_one_host_that_look_at_a_folder_at_once_do_not_disturb_each_other(
    pool: Pool, tmp_path: Path
) -> None:
    assert pool.run(looks, 2, str(tmp_path)) == [[True] * 300] * 2


def meet_with_own_folder(run: list[str], data: str) -> dict[str, Any]:
    meeting_module.PATIENCE_S, meeting_module.MESSAGE_BYTES = 0.5, {"cpu": 2**16}
    if dist.get_rank() == 1:
        now = time.time
        time.time = lambda: now() + 100
    question = Question(id="ab", folders={"run.dir": run[dist.get_rank()], "data.path": data})
    return meet(CPU, question, look(question, CPU)).model_dump()


def test_what_nodes_find_out_together(pool: Pool, tmp_path: Path) -> None:
    """Rank 2 has another disk where the others have the shared one; rank 1's clock is wrong."""
    shared, own, data = (tmp_path / name for name in ("shared", "own", "data"))
    for folder in (shared, own, data):
        folder.mkdir()
    found = pool.run(meet_with_own_folder, 3, [str(shared), str(shared), str(own)], str(data))
    assert [each["unseen"] for each in found] == [
        {"run.dir": [2], "data.path": []},
        {"run.dir": [2], "data.path": []},
        {"run.dir": [0, 1], "data.path": []},
    ]
    assert [each["shares_lock"] for each in found] == [None, True, None]
    assert [each["clock_s"] for each in found] == pytest.approx([0, 100, 0], abs=1)
    assert [sorted(each["pairs"]) for each in found] == [[1, 2], [0, 2], [0, 1]]
    for each in found:
        assert all(1e5 < rate < 1e12 for rate in (*each["pairs"].values(), each["all_reduce"], each["all_to_all"]))
    assert not [*shared.iterdir(), *own.iterdir(), *data.iterdir()], "all files are removed again"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 15])
def test_in_a_tournament_each_meets_each_once(size: int) -> None:
    met = [pair for partners in rounds(size) for pair in partners.items() if pair[0] < pair[1]]
    assert sorted(met) == [*combinations(range(size), 2)]
    assert all(partners[b] == a for partners in rounds(size) for a, b in partners.items())


@pytest.mark.parametrize("size", [17, 64, 1001])
def test_of_many_nodes_each_meets_some(size: int) -> None:
    found = rounds(size)
    assert len(found) <= MAX_ROUNDS
    for partners in found:
        assert len(partners) == size - size % 2
        assert all(partners[b] == a for a, b in partners.items())


def test_a_folder_that_may_not_be_written_is_told_with_why(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        folder = Path("/proc")  # where root may not write either
    else:
        folder = tmp_path
        folder.chmod(0o500)
    facts = look(Question(id="ab", folders={"run.dir": str(folder)}), CPU).folders["run.dir"]
    assert facts.is_there
    assert not facts.is_writable
    assert facts.problem
