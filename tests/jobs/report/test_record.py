"""What a report keeps of metrics.jsonl, with lines that a fault, another layout or an editor left there."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from moray.jobs.report.record import Record, read_record


def record_of(run: Path, *lines: dict[str, Any] | str) -> Record:
    written = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in written))
    return read_record(run)


def test_undone_steps_are_left_out_and_counted(tmp_path: Path) -> None:
    """Generation 2 died before its first step: what it undid, 3 computed again; 4 went back further, and later rolled
    a bad step back.
    """
    record = record_of(
        tmp_path,
        *({"step": step, "generation": 1, "loss": 9, "expert_load": [[9, 9]]} for step in range(1, 8)),
        {"resumed_from": 4, "generation": 2},
        {"resumed_from": 4, "generation": 3},
        *({"step": step, "generation": 3, "loss": 5} for step in range(5, 7)),
        {"resumed_from": 2, "generation": 4},
        *({"step": step, "generation": 4, "loss": step} for step in range(3, 5)),
        {"step": 7, "generation": 1, "loss": 9},
        {"resumed_from": 3, "generation": 4},
        {"step": 4, "generation": 4, "loss": 4},
    )
    assert record.steps.tolist() == [1, 2, 3, 4]
    assert record.columns["loss"].tolist() == [9, 9, 3, 4]
    assert record.undone == {3: (5, 7), 4: (3, 6)}
    assert record.grids["expert_load"].steps.tolist() == [1, 2]


def test_of_layers_the_lowest_the_mean_and_the_highest(tmp_path: Path) -> None:
    record = record_of(tmp_path, {"step": 1, "router_z": [4, 1, 1]}, {"step": 2}, {"step": 3, "router_z": []})
    found = [record.columns[f"router_z {part}"] for part in ("low", "mean", "high")]
    assert [values[0] for values in found] == [1, 2, 4]
    assert all(np.isnan(values[1:]).all() for values in found)


def test_arrays_are_those_of_the_newest_layout_and_of_rows_with_a_load(tmp_path: Path) -> None:
    record = record_of(
        tmp_path,
        {"step": 1, "device_load": [[1, 1, 1, 1]], "expert_load": [[2, 2, 0, 0]], "bytes_sent": [1, 1, 1, 1]},
        {"step": 2, "bytes_sent": [5, 5]},
        {"step": 3, "device_load": [[3, 1]], "expert_load": [[3, 0, 1, 0]], "bytes_sent": [7, 8]},
    )
    assert record.grids["device_load"].values.tolist() == [[[3, 1]]]
    assert record.grids["expert_load"].steps.tolist() == [1, 3]
    assert record.grids["bytes_sent"].values.tolist() == [[7, 8]]


def test_values_that_are_no_numbers_are_not_finite_and_cost_nothing_else(tmp_path: Path) -> None:
    record = record_of(
        tmp_path,
        '{"step": 1, "loss": NaN, "lr": 0.5, "grad_norm": Infinity}',
        {"step": 2, "loss": "two", "lr": None, "expert_load": [[1, 2], [3]], "expert_balance": ["x", 1]},
        {"step": 3, "loss": 10**400, "expert_load": [1, 2], "expert_balance": {"a": 1}, "own_seconds": [None, 1]},
        '{"step": 4, "loss": 2',
    )
    assert record.steps.tolist() == [1, 2, 3]
    assert np.isposinf(record.columns["loss"]).all()
    assert record.columns["lr"][0] == 0.5
    assert np.isnan(record.columns["lr"][1:]).all()
    assert np.isposinf(record.columns["grad_norm"][0])
    assert np.isnan(record.columns["expert_balance mean"]).all()
    assert "expert_load" not in record.grids


def test_no_file_is_no_step(tmp_path: Path) -> None:
    record = read_record(tmp_path)
    assert (record.steps.size, record.grids, record.layout) == (0, {}, None)
