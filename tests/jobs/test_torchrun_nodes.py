"""The loop of docs/launching/torchrun.md, as it stands there, on two real nodes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nodes_of_one import SmallNode, two_nodes
from tiny import tiny

from moray.cluster.events import read_events
from moray.jobs.runs.status import status_of
from moray.jobs.training.metrics import read_metrics
from moray.parallel.checkpoint.commits import list_commits

PAGE = Path(__file__).parents[2] / "docs" / "launching" / "torchrun.md"
SETTINGS = {"train__steps": 100, "train__eval_every": 0, "checkpoint__every": 20}


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def prepare(folder: Path) -> None:
    """The loop, and the commands that it calls, of this Python."""
    (loop,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / "loop").write_text(loop)
    for name, module in (("moray", "moray"), ("torchrun", "torch.distributed.run")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (folder / name).chmod(0o755)


def start(node: SmallNode, folder: Path, words: list[str]) -> subprocess.Popen[bytes]:
    own = {"NODES": "2", "PROCESSES": "1", "MEET": "n1:29555", "RUN": str(folder / "run"), "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **own, "PATH": f"{folder}:{os.environ['PATH']}"}
    with (folder / f"log-{node.name}").open("ab") as log:
        command = node.command("bash", str(folder / "loop"), *words)
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def terminate_loop(process: subprocess.Popen[bytes]) -> None:
    """Of the node's processes the first is the loop."""
    loop = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    os.kill(loop, signal.SIGTERM)


def test_the_loop_outlives_a_node_and_ends_as_asked(moray: Callable[..., Any], dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepare(tmp_path)
    words = tiny(dataset, run, **SETTINGS)
    for option in ("--run.dir", "--cluster.launcher"):  # the loop's own
        at = words.index(option)
        del words[at : at + 2]
    running: list[subprocess.Popen[bytes]] = []
    with two_nodes(tmp_path) as (first, second):
        try:
            running = [start(node, tmp_path, words) for node in (first, second)]
            until(lambda: bool(list_commits(run / "checkpoints")))
            running[1].kill()
            running[1].wait()
            lost_at = read_metrics(run)[-1]["step"]
            running[1] = start(second, tmp_path, words)
            until(lambda: [e["kind"] for e in read_events(run / "events.jsonl")].count("ready") == 2)
            until(lambda: read_metrics(run)[-1]["step"] > lost_at + 5)
            terminate_loop(running[0])
            assert [process.wait(40) for process in running] == [75, 75]
        finally:
            for process in running:
                process.kill()
                process.wait()
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [*range(1, len(rows) + 1)]
    assert lost_at < len(rows) < SETTINGS["train__steps"]
    assert list_commits(run / "checkpoints")[-1].step == len(rows)
    assert (status_of(run).state, status_of(run).generation) == ("stopped", 2)
    assert moray("pretrain", *tiny(dataset, tmp_path / "untouched", **SETTINGS)).code == 0
    untouched = read_metrics(tmp_path / "untouched")[: len(rows)]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in untouched], rel=1e-4)
