"""Who is slower than the rest is named, once; and what a row says of the workers and their GPUs."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from tiny import tiny

from moray.cluster import own_time
from moray.cluster.events import read_events
from moray.cluster.worker import WorkerContext
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.runs.words import describe
from moray.jobs.training import trainer, vitals
from moray.jobs.training.metrics import read_metrics
from moray.jobs.training.vitals import stragglers, summary
from moray.parallel.checkpoint.generations import take_generation

EVEN = [1.0, 1.1, 0.9, 1.0]
THIRD_IS_SLOW = [1.0, 1.1, 2.0, 1.0]


@pytest.mark.parametrize(
    ("readings", "before", "found"),
    [
        ([THIRD_IS_SLOW] * 3, [], [2]),
        ([THIRD_IS_SLOW] * 2, [], []),
        ([THIRD_IS_SLOW, EVEN, THIRD_IS_SLOW], [], []),
        ([EVEN, EVEN, THIRD_IS_SLOW], [2], [2]),
        ([THIRD_IS_SLOW, EVEN, EVEN, EVEN], [2], []),
        ([[1.0, 1.3]] * 3, [], [1]),
        ([[1.0, 1.2]] * 3, [], []),
        ([[1.0]] * 3, [], []),
        ([[3.0, 1.0, 1.0, 3.0, 1.0]] * 3, [], [0, 3]),
    ],
)
def test_a_straggler_is_clearly_and_persistently_slower(readings: Any, before: list[int], found: list[int]) -> None:
    assert stragglers(readings, before) == found


def test_a_row_tells_the_worst_of_the_gpus() -> None:
    cool = {"own_seconds": 1.0, "temperature_c": 60, "power_w": 300.0, "memory_bytes": 5, "throttling": ()}
    hot = {"own_seconds": 1.5, "temperature_c": 90, "power_w": 200.0, "memory_bytes": 7, "throttling": ("heat",)}
    assert summary([cool, hot]) == {
        "own_seconds": [1.0, 1.5],
        "own_seconds_slowest": 1.5,
        "temperature_c": 90,
        "power_w": 500.0,
        "gpu_memory_bytes": 7,
        "throttled": 1,
        "throttling": {"1": ["heat"]},
    }
    assert summary([{"node": "n", "own_seconds": None}]) == {}


def train_with_a_slow_rank(arguments: list[str], slow: int, until: int) -> None:
    """Rank `slow` has more to compute up to step `until`."""
    take_step = trainer.take_step

    def take_longer(training: Any, batch: Any) -> Any:
        busy_until = time.thread_time() + (0.2 if dist.get_rank() == slow and training.step < until else 0.05)
        while time.thread_time() < busy_until:
            pass
        return take_step(training, batch)

    trainer.take_step, vitals.EVERY = take_longer, 2
    own_time._runnable_seconds = time.thread_time  # other tests may use one rank's core and not the other's
    config = load_config(*parse_settings(arguments))
    rank, size = dist.get_rank(), dist.get_world_size()
    context = WorkerContext(
        rank, size, rank, size, 1, torch.device("cpu"), dist.HashStore, lambda step, status: None, lambda: False
    )
    trainer.run_steps(trainer.set_up(context, config))


def test_a_run_names_its_straggler_once_and_again_when_it_is_none(dataset: Path, tmp_path: Path, pool: Pool) -> None:
    changes = {"train__steps": 14, "train__eval_every": 0, "cluster__workers": 2, "cluster__launcher": "ray"}
    assert take_generation(tmp_path / "checkpoints") == 1
    pool.run(train_with_a_slow_rank, 2, tiny(dataset, tmp_path, **changes), 1, 8)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "own_seconds" in row] == [2, 4, 6, 8, 10, 12, 14]
    for row in rows[3:8:2]:
        assert row["own_seconds"][1] > row["own_seconds"][0] + 0.1
        assert row["own_seconds_slowest"] == row["own_seconds"][1]
        assert row["seconds"] > row["own_seconds"][0] + 0.1, "the first waited for the second"
    named, cleared = (event for event in read_events(tmp_path / "events.jsonl") if event["kind"] == "straggler")
    # What every first step does once may be more than the slow one's surplus.
    assert named["step"] in (6, 8)
    assert [one["rank"] for one in named["ranks"]] == [1]
    assert (cleared["step"], cleared["ranks"]) == (14, [])
    line = describe("straggler", named)
    assert line
    assert "rank 1 on " in line
    assert describe("straggler", cleared) == "no worker is slower than the others any more"
