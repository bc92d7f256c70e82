"""Steps that are bad twice do not reach the weights: the run stops, skips their batches, or goes back behind them.

The truth is a run whose stream never had those batches.
"""

import io
import math
from collections.abc import Generator
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
import torch
from poison import poisoned
from rich.console import Console
from tiny import tiny

from moray.cluster.events import read_events
from moray.data.stream import Batch, Stream
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.config.run import RunConfig
from moray.jobs.runs.checkpoints import show_checkpoints
from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.runs.status import status_of
from moray.jobs.runs.watcher import Listener
from moray.jobs.training.bad_steps import what_is_wrong
from moray.jobs.training.drive import drive
from moray.jobs.training.metrics import read_metrics
from moray.parallel.checkpoint.commits import list_commits, read_tensors

BATCH = 4


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_not_finite_is_wrong(loss: float, norm: float) -> None:
    assert what_is_wrong(loss, norm, [], None) == f"loss {loss}, gradient norm {norm}"


def test_a_spike_is_measured_against_128_steps_and_does_not_hide_the_next() -> None:
    numbers = np.random.default_rng(0)
    losses, norms = numbers.normal(3, 0.1, 128).tolist(), numbers.normal(1, 0.2, 128).tolist()
    applied = list(zip(losses, norms, strict=True))
    # Of a normal distribution, the robust deviation is the standard deviation.
    for at, (name, values) in enumerate((("loss", losses), ("gradient norm", norms))):
        ordinary = [3.0, 1.0]
        ordinary[at] = fmean(values) + 5 * pstdev(values)
        assert what_is_wrong(*ordinary, applied, 6.0) is None
        ordinary[at] = fmean(values) + 7.5 * pstdev(values)
        assert (what_is_wrong(*ordinary, applied, 6.0) or "").startswith(f"{name} ")
        assert what_is_wrong(*ordinary, applied, None) is None
        assert what_is_wrong(*ordinary, applied[:63], 6.0) is None, "too few to tell"
    assert what_is_wrong(0.0, 0.0, applied, 6.0) is None, "less is no spike"
    with_spikes = [*applied[:-12], *[(30.0, 9.0)] * 12]
    assert "spike_sigmas=6" in (what_is_wrong(5.0, 1.0, with_spikes, 6.0) or "")


def config_of(dataset: Path, run: Path, **changes: object) -> RunConfig:
    plan = {"train__steps": 12, "train__eval_every": 0, "checkpoint__every": 4, "checkpoint__keep": 9, **changes}
    return load_config(*parse_settings(tiny(dataset, run, **plan)))


def weights(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    commits = list_commits(run / "checkpoints")
    (commit,) = [commit for commit in commits if commit.step == (step or commits[-1].step)]
    return dict(read_tensors(commit))


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def computed(run: Path) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"], row["expert_balance"]) for row in read_metrics(run)]


def train_without(config: RunConfig, monkeypatch: pytest.MonkeyPatch, *batches: int) -> None:
    """A run whose stream has no such batches."""
    whole = Stream.batches

    def batches_left(stream: Stream, start: int) -> Generator[Batch, None, None]:
        yield from (batch for batch in whole(stream, start) if batch.step not in batches)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "batches", batches_left)
        assert drive(config, Console(quiet=True)) == 0


class EndError(Exception):
    """A process that ends between two steps."""


class EndsAt(Listener):
    def __init__(self, *steps: int) -> None:
        self._steps = list(steps)

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        if self._steps[:1] == [step]:
            self._steps.pop(0)
            raise EndError


def run_to_the_end(config: RunConfig, listener: Listener | None = None) -> int:
    """Given again as often as it is interrupted; returns how often."""
    for interruptions in range(9):
        try:
            assert drive(config, Console(quiet=True), listener) == 0
        except EndError:
            continue
        return interruptions
    raise AssertionError("it never ends")


def test_skipped_batches_leave_no_trace_but_in_the_ledger(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches 5 and 6, and the last one. Once more, it ends behind the first skip and in the middle of the second."""
    settings: dict[str, object] = {"train__on_bad_step": "skip", "train__max_skipped": 2}
    train_without(config_of(dataset, tmp_path / "truth"), monkeypatch, 5, 6, 12)
    config = config_of(dataset, tmp_path / "run", **settings)
    with poisoned(config, nan=(5, 6, 12)):
        assert drive(config, Console(quiet=True)) == 0
        interrupted = config_of(dataset, tmp_path / "interrupted", **settings)
        assert run_to_the_end(interrupted, EndsAt(6, 10)) == 2
    for run in (tmp_path / "run", tmp_path / "interrupted"):
        assert computed(run) == computed(tmp_path / "truth")
        assert same_weights(run, tmp_path / "truth")
        assert ledger_problems(run) == []
        rows = read_metrics(run)
        why = "loss nan, gradient norm nan"
        assert {row["step"]: row["skipped"] for row in rows if "skipped" in row} == {
            6: [{"positions": [20, 24], "why": why}, {"positions": [24, 28], "why": why}],
            11: [{"positions": [48, 52], "why": why}],
        }
        assert rows[-1]["positions"] == [56, 60]
        assert list_commits(run / "checkpoints")[-1].manifest.metadata["data"]["position"] == 60
        assert status_of(run).skipped == 12
        shown = io.StringIO()
        assert show_checkpoints(run, check=False, console=Console(file=shown, width=200)) == 0
        assert f"positions 20 to 24 were skipped before step 6: {why}" in shown.getvalue()
    told = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["kind"] == "skip"]
    assert [(event["step"], event["positions"]) for event in told] == [(6, [20, 24]), (6, [24, 28]), (11, [48, 52])]
    assert ledger_problems(tmp_path / "truth") == [
        "step 6 skips positions 20 to 28",
        "step 11 skips positions 48 to 52",
    ], "a gap that nobody declared"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {},
            "step 6: loss nan, gradient norm nan; the weights are as step 5 left them; computed once more it was the",
        ),
        (
            {"train__on_bad_step": "skip", "train__max_skipped": 2},
            "that makes 3 skipped batches in a row, more than train.max_skipped=2",
        ),
    ],
)
def test_it_stops_where_no_more_may_be_skipped(
    dataset: Path, tmp_path: Path, settings: dict[str, object], says: str
) -> None:
    config = config_of(dataset, tmp_path, **settings)
    with poisoned(config, nan=(5, 6, 7)), pytest.raises(FloatingPointError) as error:
        drive(config, Console(quiet=True))
    assert says in str(error.value)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert [commit.step for commit in list_commits(tmp_path / "checkpoints")] == [4]


def test_rolled_back_it_goes_on_behind_the_bad_batch(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 9 is bad, right after a commit: that of step 4 is older than its weights. Also where it ends meanwhile."""
    settings: dict[str, object] = {"train__on_bad_step": "rollback", "train__max_skipped": 5}
    train_without(config_of(dataset, tmp_path / "truth"), monkeypatch, 4, 5, 6, 7, 8)
    config = config_of(dataset, tmp_path / "run", **settings)
    interrupted = config_of(dataset, tmp_path / "interrupted", **settings)
    with poisoned(config, nan=(8,)):
        assert drive(config, Console(quiet=True)) == 0
        assert run_to_the_end(interrupted, EndsAt(8, 6)) == 2
    for run in (tmp_path / "run", tmp_path / "interrupted"):
        assert computed(run) == computed(tmp_path / "truth")
        assert same_weights(run, tmp_path / "truth")
        assert ledger_problems(run) == []
        (skipped,) = [row["skipped"] for row in read_metrics(run) if "skipped" in row]
        assert skipped == [{"positions": [16, 36], "why": "loss nan, gradient norm nan"}]
    (event,) = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["kind"] == "rollback"]
    assert (event["step"], event["position"], event["bad_step"], event["positions"]) == (4, 16, 9, [16, 36])


def test_a_rollback_needs_an_older_commit_and_stays_within_its_bound(dataset: Path, tmp_path: Path) -> None:
    settings: dict[str, object] = {"train__on_bad_step": "rollback", "train__max_skipped": 5}
    config = config_of(dataset, tmp_path / "early", **settings)
    with poisoned(config, nan=(3,)), pytest.raises(FloatingPointError, match=r"step 4: .* there is no older commit"):
        drive(config, Console(quiet=True))
    config = config_of(dataset, tmp_path / "often", **settings)
    with (
        poisoned(config, nan=(6, 8, 9)),
        pytest.raises(FloatingPointError, match="6 skipped batches in a row, more than"),
    ):
        drive(config, Console(quiet=True))
    # Of step 4 alone: batches 4 to 6, then 4 to 8, then one too many.
    assert [commit.step for commit in list_commits(tmp_path / "often" / "checkpoints")] == [4]


def test_a_spike_is_passed_over_and_a_resume_remembers_what_is_usual(dataset: Path, tmp_path: Path) -> None:
    """Batch 66; an attempt that begins at step 64 knows the losses of the steps before from its commit."""
    settings: dict[str, object] = {"train__on_bad_step": "skip", "train__max_skipped": 1, "train__spike_sigmas": 9}
    settings |= {"train__steps": 68, "checkpoint__every": 64}
    config = config_of(dataset, tmp_path / "run", **settings)
    with poisoned(config, spike=(66,)):
        interruptions = run_to_the_end(config, EndsAt(65))
    assert interruptions == 1
    (row,) = [row for row in read_metrics(tmp_path / "run") if "skipped" in row]
    assert (row["step"], row["skipped"][0]["positions"]) == (67, [264, 268])
    assert "gradient norm" in row["skipped"][0]["why"]
    assert ledger_problems(tmp_path / "run") == []
