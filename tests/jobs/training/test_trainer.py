"""What long work between two steps tells the cluster."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import tiny

from moray.cluster.group import Hooks
from moray.cluster.local import run_local
from moray.cluster.worker import TakeGeneration
from moray.data.dataset import Dataset
from moray.data.stream import evaluation_batches
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.config.run import RunConfig
from moray.jobs.runs.watcher import Listener
from moray.jobs.training.commit import versions
from moray.jobs.training.drive import drive
from moray.jobs.training.metrics import read_metrics
from moray.jobs.training.trainer import is_due, train
from moray.parallel.checkpoint.commits import list_commits, verify
from moray.parallel.checkpoint.generations import take_generation


def test_every_so_many_steps_and_never() -> None:
    assert [step for step in range(1, 10) if is_due(step, 3)] == [3, 6, 9]
    assert not any(is_due(step, 0) for step in range(1, 10))


def test_a_commit_names_the_libraries_that_made_it() -> None:
    assert versions().keys() >= {"python", "torch", "ray", "safetensors"}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def config_of(dataset: Path, run: Path, **changes: object) -> RunConfig:
    return load_config(*parse_settings(tiny(dataset, run, **{"train__steps": 4, "train__eval_every": 2, **changes})))


def n_evaluation_batches(dataset: Path) -> int:
    settings: dict[str, Any] = {"seq_len": 64, "global_batch": 4, "lanes": range(4)}
    return len(list(evaluation_batches(Dataset.open(dataset), "validation", **settings)))


def in_folder(run: Path) -> TakeGeneration:
    return partial(take_generation, run / "checkpoints")


def test_an_evaluation_beats_at_every_batch(dataset: Path, tmp_path: Path) -> None:
    """However long the validation split is: a worker that beats is not taken for hung."""
    told: list[tuple[int, dict[str, Any]]] = []
    run_local(
        train,
        config_of(dataset, tmp_path, checkpoint__every=100),
        "cpu",
        Hooks(on_status=lambda rank, step, status: told.append((step, status)), take_generation=in_folder(tmp_path)),
    )
    n_batches = n_evaluation_batches(dataset)
    assert n_batches >= 3, "or this tests nothing"
    steps = [step for step, _ in told]
    assert [steps.count(step) for step in (2, 4)] == [1, 1], "an evaluation repeats the step before it"
    assert [steps.count(step) - 1 for step in (1, 3)] == [n_batches, n_batches]
    assert steps == sorted(steps)
    by_step = dict(told)
    assert all(status == by_step[step] for step, status in told), "a repeated beat says the same, and loses no numbers"


def test_waiting_for_a_slow_disk_beats_too(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit whose files take seconds to reach the disk: the last save, which the end of the run waits for."""
    told: list[int] = []
    fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors"):
            time.sleep(2.5)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow_fsync)
    run_local(
        train,
        config_of(dataset, tmp_path, train__steps=2, train__eval_every=0),
        "cpu",
        Hooks(on_status=lambda rank, step, status: told.append(step), take_generation=in_folder(tmp_path)),
    )
    n_batches = n_evaluation_batches(dataset)
    assert told[: 1 + n_batches + 1] == [1] * (1 + n_batches) + [2]
    assert told.count(2) >= 2, "beats while finish() waits"
    assert len(list_commits(tmp_path / "checkpoints")) == 1


class StopAfter(Listener):
    """SIGTERM once these heartbeats have come."""

    def __init__(self, steps: list[int]) -> None:
        self.steps: list[int] = []
        self._last = steps

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        self.steps.append(step)
        if self.steps == self._last:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("asked", "told"), [([1], [1, 2]), ([1, 1], [1, 1, 2])], ids=["before", "in its midst"])
def test_asked_to_stop_an_evaluation_is_skipped_or_left(
    dataset: Path, tmp_path: Path, asked: list[int], told: list[int]
) -> None:
    """Grace periods are short: the step is committed without its validation loss, and the run goes on from it."""
    listener, config = StopAfter(asked), config_of(dataset, tmp_path)
    assert drive(config, Console(quiet=True), listener) == 75
    assert listener.steps == told
    assert ["validation_loss" in row for row in read_metrics(tmp_path)] == [False, False]
    (commit,) = list_commits(tmp_path / "checkpoints")
    assert (commit.step, verify(commit)) == (2, [])
    assert drive(config, Console(quiet=True)) == 0
    assert ["validation_loss" in row for row in read_metrics(tmp_path)] == [False, False, False, True]
