"""A stop that comes early, and one that a scheduler makes of the first process that leaves."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from slow_pruning import train_and_prune_slowly
from tiny import tiny

from moray.cluster.events import read_events
from moray.cluster.group import Group, Hooks
from moray.cluster.ray.supervisor import supervise
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.training.metrics import read_metrics
from moray.parallel.checkpoint.commits import list_commits
from moray.parallel.checkpoint.generations import take_generation

# A driver or rank that gets a real SIGTERM at a known moment: when it begins to import torch, or has loaded a commit.
DURING_IMPORTS = """
import os, signal, sys

class Moment:
    @staticmethod
    def find_spec(name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Moment)
from moray.jobs.cli import main

main()
"""
WHILE_LOADING = """
import os, signal
import moray.jobs.training.begin
from moray.jobs.cli import main

resume = moray.jobs.training.begin.resume

def resume_and_be_signalled(*arguments):
    resume(*arguments)
    if os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGTERM)

moray.jobs.training.begin.resume = resume_and_be_signalled
main()
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}


def run(*command: str) -> tuple[int, str]:
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, said


def script(text: str, folder: Path) -> str:
    path = folder / "signalled.py"
    path.write_text(text)
    return str(path)


def under_torchrun(*words: str) -> tuple[int, str]:
    return run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words)


@pytest.mark.parametrize("text", [DURING_IMPORTS, WHILE_LOADING], ids=["during imports", "while loading"])
def test_alone(dataset: Path, tmp_path: Path, text: str) -> None:
    code, said = run(sys.executable, script(text, tmp_path), "pretrain", *tiny(dataset, tmp_path / "run"))
    assert code == 75, said
    assert read_metrics(tmp_path / "run") == []
    assert list_commits(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize("text", [DURING_IMPORTS, WHILE_LOADING], ids=["during imports", "while loading"])
def test_two_ranks(dataset: Path, tmp_path: Path, text: str) -> None:
    """While loading, rank 0 alone is asked: it must not leave its peer in a collective."""
    words = tiny(dataset, tmp_path / "run", cluster__launcher="torchrun")
    _, said = under_torchrun(script(text, tmp_path), "pretrain", *words)
    # torchrun's own code is 1 whatever its workers return.
    assert re.findall(r"exitcode +: (\S+)", said) == ["75", "75"], said
    assert read_metrics(tmp_path / "run") == []


def test_a_driver_of_ray(ray_cluster: str, dataset: Path, tmp_path: Path) -> None:
    words = tiny(dataset, tmp_path / "run", cluster__launcher="ray", cluster__workers=2)
    code, said = run(sys.executable, script(DURING_IMPORTS, tmp_path), "pretrain", *words)
    assert code == 75, said
    assert [event["kind"] for event in read_events(tmp_path / "run" / "events.jsonl")] == ["device", "end"]


def test_ranks_that_wait_for_the_last_one_are_no_hangs(ray_cluster: str, dataset: Path, tmp_path: Path) -> None:
    words = tiny(dataset, tmp_path, cluster__launcher="ray", cluster__workers=2, train__steps=3)
    kinds: list[str] = []
    code = supervise(
        train_and_prune_slowly,
        load_config(*parse_settings(words)),
        Group(workers=2, heartbeat_timeout_s=3.0),
        Hooks(
            on_event=lambda kind, fields: kinds.append(kind),
            take_generation=partial(take_generation, tmp_path / "checkpoints"),
        ),
    )
    assert code == 0
    assert kinds == ["device", "start", "ready", "end"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_the_first_rank_that_leaves_has_the_others_terminated(dataset: Path, tmp_path: Path) -> None:
    """As srun --kill-on-bad-exit does with tasks that are ranks: each ends with 75 all the same."""
    words = tiny(dataset, tmp_path, cluster__launcher="torchrun", train__steps=100000, train__global_batch=6)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    group |= {"TORCHELASTIC_RUN_ID": "by hand", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "moray", "pretrain", *words],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **group),
        )
        for rank in range(3)
    ]
    try:
        until = time.monotonic() + 40
        while len(read_metrics(tmp_path)) < 3:
            assert all(rank.poll() is None for rank in ranks)
            assert time.monotonic() < until
            time.sleep(0.05)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        while all(rank.poll() is None for rank in ranks):
            time.sleep(0.001)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        assert [rank.wait(20) for rank in ranks] == [75, 75, 75]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert list_commits(tmp_path / "checkpoints")[-1].step == read_metrics(tmp_path)[-1]["step"]
