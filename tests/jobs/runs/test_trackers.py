"""TensorBoard, wandb and mlflow themselves, with files for servers: what each has of a run's steps, and what they cost.

The truth is what their own readers find.
"""

import importlib.util
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import TINY, tiny

from moray.jobs.config.load import flatten, load_config
from moray.jobs.config.recipe_file import to_toml
from moray.jobs.config.run import RunConfig
from moray.jobs.runs import tracking
from moray.jobs.runs.tracking import numbers, tracked
from moray.jobs.training.metrics import MetricsLog, read_metrics

needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="pip install wandb")
needs_mlflow = pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="pip install mlflow-skinny")
TRACKERS = ["tensorboard", pytest.param("wandb", marks=needs_wandb), pytest.param("mlflow", marks=needs_mlflow)]


@pytest.fixture(autouse=True)
def without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def config(run: Path, trackers: str) -> RunConfig:
    run.mkdir(exist_ok=True)
    settings = {**TINY, "data.path": "d", "run.dir": run, "run.trackers": trackers}
    return load_config(None, {name: str(value) for name, value in settings.items()})


def following(config: RunConfig) -> AbstractContextManager[None]:
    return tracked(Path(config.run.dir), config.run.trackers, dict(flatten(config.model_dump())))


def write(run: Path, steps: range, generation: int) -> None:
    """As rank 0 of that generation does; a step's loss tells which one computed it."""
    log = MetricsLog(run, steps.start - 1, generation)
    for step in steps:
        log.write({"step": step, "loss": step + generation / 10, "layout": "text", "generation": generation})


def shown(name: str, run: Path) -> list[tuple[int, float]]:
    """Step and loss of every point that the tracker has."""
    return {"tensorboard": in_tensorboard, "wandb": in_wandb, "mlflow": in_mlflow}[name](run)


def in_tensorboard(run: Path) -> list[tuple[int, float]]:
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    return [(event.step, event.value) for event in board.Scalars("loss")]


def in_mlflow(run: Path) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("moray")
    assert experiment
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.params["train.global_batch"] == "4"
    assert found.info.run_name == run.name
    points = [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, "loss")]
    return sorted(points)


def in_wandb(run: Path) -> list[tuple[int, float]]:
    from wandb.proto.wandb_internal_pb2 import Record

    points, ids = [], set()
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for packed in wandb_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(packed)
            ids |= {record.run.run_id} if record.WhichOneof("record_type") == "run" else set()
            if record.WhichOneof("record_type") == "history":
                row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                points.append((int(row["_step"]), float(row["loss"])))
    assert len(ids) == 1
    return points


def wandb_records(data: bytes, block: int = 32768) -> Iterator[bytes]:
    """LevelDB's log: blocks of checksum, length, type and data; types are whole (1), first, middle and last part."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.mark.parametrize("name", TRACKERS)
def test_a_resume_goes_on_with_the_same_curves_and_shows_no_step_twice(tmp_path: Path, name: str) -> None:
    """The first attempt is killed at step 5 with a commit at 3."""
    run = tmp_path / "run"
    settings = config(run, name)
    for steps, generation in ((range(1, 6), 1), (range(4, 9), 2)):
        with following(settings):
            write(run, steps, generation)
    computed = [1, 1, 1, 2, 2, 2, 2, 2] if name == "tensorboard" else [1, 1, 1, 1, 1, 2, 2, 2]
    expected = [(step, pytest.approx(step + by / 10)) for step, by in zip(range(1, 9), computed, strict=True)]
    assert shown(name, run) == expected
    assert not (run / "events.jsonl").exists(), "no tracker has failed"


def test_numbers_a_layer_have_names_of_their_own() -> None:
    row = {
        "step": 3,
        "loss": 1.5,
        "expert_balance": [1.25, 2],
        "rows_sent": [[3, 4]],
        "positions": [0, 8],
        "layout": "ep=2",
    }
    assert numbers(row) == {"loss": 1.5, "expert_balance/0": 1.25, "expert_balance/1": 2}


def test_a_tracker_that_comes_later_gets_all_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = config(run, "tensorboard")
    write(run, range(1, 4), 1)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('[1]\n{"step": 4, "loss"')
    with following(settings):
        write(run, range(4, 5), 2)
    assert [step for step, _ in in_tensorboard(run)] == [1, 2, 3, 4]


def test_the_last_row_of_an_overtaken_attempt_is_not_shown(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = config(run, "tensorboard")
    rows = [{"step": 1, "generation": 1}, {"step": 2, "generation": 2}, {"step": 3, "generation": 1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**row, "loss": 1.0}) + "\n" for row in rows))
    with following(settings):
        pass
    assert [step for step, _ in in_tensorboard(run)] == [1, 2]
    assert [row["step"] for row in read_metrics(run)] == [1, 2]


@needs_wandb
@needs_mlflow
def test_a_whole_run_with_all_of_them(moray: Callable[..., Any], dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = tiny(dataset, run, train__steps=3, run__trackers="tensorboard,wandb,mlflow")
    assert moray("pretrain", *words).code == 0
    losses = [(row["step"], pytest.approx(row["loss"])) for row in read_metrics(run)]
    assert len(losses) == 3
    for name in ("tensorboard", "wandb", "mlflow"):
        assert shown(name, run) == losses
    assert load_config(str(run / "config.toml"), {}).run.trackers == ("tensorboard", "wandb", "mlflow")


@needs_mlflow
def test_a_server_that_is_not_there_costs_a_line(
    moray: Callable[..., Any], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt finds none, and ends as ever; the second one finds one, and sends the first one's steps too."""
    run = tmp_path / "run"
    store = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    outcome = moray("pretrain", *tiny(dataset, run, train__steps=2, run__trackers="mlflow"))
    assert outcome.code == 0
    (line,) = [line for line in outcome.err.splitlines() if "mlflow" in line]
    assert line.startswith("mlflow failed: MlflowException: API request to http://127.0.0.1:9/")
    assert line.endswith("the run goes on without it, and the next start sends what it lacks")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert moray("pretrain", *tiny(dataset, run, train__steps=4, run__trackers="mlflow")).code == 0
    assert [step for step, _ in in_mlflow(run)] == [1, 2, 3, 4]


@needs_mlflow
def test_a_server_that_never_answers_holds_nobody_up(
    moray: Callable[..., Any], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FAREWELL_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        outcome = moray("pretrain", *tiny(dataset, tmp_path / "run", train__steps=2, run__trackers="mlflow"))
    assert outcome.code == 0
    assert "mlflow failed: has not taken all within 0.5 s of the end" in outcome.err
    assert len(read_metrics(tmp_path / "run")) == 2


def test_a_run_that_was_removed_before_its_tracker_came_stays_removed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = config(run, "tensorboard")
    run.rmdir()
    with following(settings):
        pass
    assert not run.exists()


def test_a_tracker_that_is_not_there_is_refused_before_anything_is_written(
    moray: Callable[..., Any], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr("moray.jobs.runs.trackers.find_spec", lambda name: None)
    outcome = moray("pretrain", *tiny(dataset, run, run__trackers="tensorboard,wandb"))
    assert outcome.code == 2
    assert outcome.err.endswith("tensorboard is not installed; pip install tensorboard, or leave it out\n")
    monkeypatch.undo()
    monkeypatch.setattr("moray.jobs.runs.trackers.find_spec", lambda name: True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    outcome = moray("pretrain", *tiny(dataset, run, run__trackers="mlflow"))
    assert outcome.code == 2
    assert "run.trackers=mlflow needs MLFLOW_TRACKING_URI in the environment: a server" in outcome.err
    outcome = moray("pretrain", *tiny(dataset, run, run__trackers="tensorbord"))
    assert outcome.code == 2
    assert "run.trackers" in outcome.err
    assert not run.exists()


def test_no_tracker_at_all(dataset: Path, tmp_path: Path, moray: Callable[..., Any]) -> None:
    assert config(tmp_path / "other", "wandb,wandb,tensorboard").run.trackers == ("wandb", "tensorboard")
    assert 'trackers = ["tensorboard"]' in to_toml(config(tmp_path / "other", "tensorboard"))
    assert moray("pretrain", *tiny(dataset, tmp_path / "run", train__steps=2, run__trackers="none")).code == 0
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert load_config(str(tmp_path / "run" / "config.toml"), {}).run.trackers == ()
