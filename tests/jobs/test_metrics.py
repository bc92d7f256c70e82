"""metrics.jsonl after crashes and restarts, TensorBoard, and the numbers derived for them."""

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs.metrics import MetricsLog, expert_balance, matmul_peak, read_metrics


def write(run: Path, steps: range, **fields: object) -> None:
    with closing(MetricsLog(run, steps.start)) as log:
        for step in steps:
            log.write({"step": step, "loss": 1 / step, **fields})


def test_what_is_written_is_read_one_json_object_a_step(tmp_path: Path) -> None:
    write(tmp_path / "new" / "run", range(1, 4), layout="dp_shard=2", expert_balance=[1.5, 2.0])
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    expected = [{"step": n, "loss": 1 / n, "layout": "dp_shard=2", "expert_balance": [1.5, 2.0]} for n in (1, 2, 3)]
    assert [json.loads(line) for line in lines] == expected
    assert read_metrics(tmp_path / "new" / "run") == expected


def test_a_row_is_visible_at_once(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path, 1)) as log:
        log.write({"step": 1, "loss": 2.0})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_of_a_step_computed_twice_the_later_row_counts(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), generation=1)
    write(tmp_path, range(4, 8), generation=2)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["generation"] for row in rows] == [1, 1, 1, 2, 2, 2, 2]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 9, "history is not erased"


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_a_last_line_is_passed_over_and_does_not_spoil_the_next(tmp_path: Path, cut: int) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])  # 1: the line is whole but for its end
    whole = [1, 2, 3] if cut == 1 else [1, 2]
    assert [row["step"] for row in read_metrics(tmp_path)] == whole
    write(tmp_path, range(3, 5))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_run_that_has_not_begun_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_tensorboard_shows_the_curves_without_the_steps_that_were_undone(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), tokens=7, layout="text")
    write(tmp_path, range(4, 6), tokens=9)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [event.value for event in board.Scalars("tokens")] == [7, 7, 7, 9, 9]
    assert set(board.Tags()["scalars"]) == {"loss", "tokens"}


def test_expert_balance_is_the_busiest_over_the_mean() -> None:
    tokens = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [1, 2, 3, 2]])
    assert expert_balance(tokens) == [1.0, 4.0, 1.5]
    assert expert_balance(torch.zeros(1, 4, dtype=torch.int64)) == [0.0]
    assert expert_balance(None) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_a_machines(dtype: torch.dtype) -> None:
    assert 1e9 < matmul_peak(torch.device("cpu"), dtype, seconds=0.01) < 1e15
