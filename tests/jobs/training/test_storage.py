"""A node that sees another folder under the run's path than the others: said before the first step."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny

from moray.parallel.checkpoint.generations import sees_generation, take_generation

IN_A_HURRY = """
from functools import partial
from moray.jobs.training import begin
begin.sees_generation = partial(begin.sees_generation, within_s=1.0)
from moray.jobs.cli import main
main()
"""
ITS_OWN = 'mount -t tmpfs tmpfs "$RUN" && exec "$@"'


def test_a_folder_is_that_of_the_run_where_the_generation_or_a_newer_one_is_seen(tmp_path: Path) -> None:
    mine = take_generation(tmp_path)
    assert sees_generation(tmp_path, mine, within_s=0)
    assert not sees_generation(tmp_path / "of-another-node", mine, within_s=0.1)
    take_generation(tmp_path)
    assert sees_generation(tmp_path, mine, within_s=0)
    assert not sees_generation(tmp_path, mine + 2, within_s=0.1)


def test_a_node_with_a_folder_of_its_own_under_the_run_s_path(dataset: Path, tmp_path: Path) -> None:
    """Rank 1 has a mount namespace, and in it an empty disk where the run is."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces can be made here")
    run = tmp_path / "run"
    run.mkdir()
    pretrain = [sys.executable, "-c", IN_A_HURRY, "pretrain", *tiny(dataset, run, cluster__launcher="torchrun")]
    rank = f'[ $RANK = 0 ] && exec "$@"; exec unshare --mount bash -c {ITS_OWN!r} rank "$@"'
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    process = subprocess.Popen(
        [*torchrun, "bash", "-c", rank, "rank", *pretrain],
        env={**os.environ, "RUN": str(run), "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=150)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 1
    assert f"run.dir={run} is not the folder that this run was started in" in said
    assert "must lie on storage that all nodes share" in said
    assert not (run / "metrics.jsonl").exists()
