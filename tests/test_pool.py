"""The pool of the tests: a call leaves nothing behind, and none waits for a rank that is lost."""

import os
import signal
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import Pool


def add_ranks(value: int) -> torch.Tensor:
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    return total


def test_a_call_leaves_no_process_thread_or_descriptor_behind(pool: Pool) -> None:
    pool.run(add_ranks, 2, 0)
    server = Path(f"/proc/{forkserver._forkserver._forkserver_pid}")  # type: ignore[attr-defined]

    def held() -> tuple[list[str], list[int]]:
        children = (server / "task" / server.name / "children").read_text().split()
        folders = [folder / kind for folder in (server, Path("/proc/self")) for kind in ("task", "fd")]
        return children, [len(list(folder.iterdir())) for folder in folders]

    before = held()
    assert before[0] == []
    for value in range(8):
        assert [int(total) for total in pool.run(add_ranks, 2, value)] == [2 * value + 1] * 2
    until = time.monotonic() + 10
    while held() != before and time.monotonic() < until:  # the server closes a child's pipe after it has reaped it
        time.sleep(0.01)
    assert held() == before


def fail_on(failing: int, how: str) -> None:
    if dist.get_rank() == failing:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("apples")
    time.sleep(1000)


@pytest.mark.parametrize(("how", "said"), [("killed", "ended without a word"), ("raised", "KeyError: 'apples'")])
def test_a_lost_rank_fails_the_call_and_its_peers_are_not_waited_for(pool: Pool, how: str, said: str) -> None:
    with pytest.raises(AssertionError) as failure:
        pool.run(fail_on, 2, 1, how)
    assert said in str(failure.value)
    assert "rank 0:\ngave no answer in time" in str(failure.value)
