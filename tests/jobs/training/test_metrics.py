"""metrics.jsonl after crashes and restarts, and the numbers derived for them."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from moray.cluster.cores import usable_cores
from moray.jobs.training import metrics
from moray.jobs.training.metrics import (
    MetricsLog,
    balance,
    entropy,
    expert_metrics,
    matmul_peak,
    read_metrics,
    variation,
    worker_peak,
)
from moray.model.config.moe import MoEConfig
from moray.parallel.gradients import ExpertLoad


def write(run: Path, steps: range, generation: int = 1, **fields: object) -> None:
    log = MetricsLog(run, steps.start - 1, generation)
    for step in steps:
        log.write({"step": step, "loss": 1 / step, **fields})


def test_what_is_written_is_read_one_json_object_a_step(tmp_path: Path) -> None:
    write(tmp_path / "new" / "run", range(1, 4), layout="dp_shard=2", expert_balance=[1.5, 2.0])
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    expected = [{"step": n, "loss": 1 / n, "layout": "dp_shard=2", "expert_balance": [1.5, 2.0]} for n in (1, 2, 3)]
    assert [json.loads(line) for line in lines] == expected
    assert read_metrics(tmp_path / "new" / "run") == expected


def test_a_row_is_visible_at_once(tmp_path: Path) -> None:
    MetricsLog(tmp_path, 0, 1).write({"step": 1, "loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_steps_above_the_one_resumed_from_no_longer_count(tmp_path: Path) -> None:
    """Killed at step 142 with a commit at 100, resumed, stopped at 111: there is no step 112."""
    write(tmp_path, range(1, 143), loss=1.0)
    write(tmp_path, range(101, 112), generation=2, loss=2.0)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 112))
    assert [row["loss"] for row in rows] == [1.0] * 100 + [2.0] * 11
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 142 + 1 + 11, "history is not erased"
    assert lines[142] == {"resumed_from": 100, "generation": 2}


def test_a_resume_that_undoes_nothing_leaves_no_mark(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    write(tmp_path, range(4, 6), generation=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]


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


LOADS = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [1, 2, 3, 2]])


def test_balance_is_the_busiest_over_the_mean() -> None:
    assert balance(LOADS) == [1.0, 4.0, 1.5]
    assert balance(torch.zeros(1, 4, dtype=torch.int64)) == [0.0]


def test_variation_is_numpys_deviation_over_the_mean() -> None:
    expected = LOADS.numpy().std(1) / LOADS.numpy().mean(1)
    assert variation(LOADS) == pytest.approx(expected.tolist(), rel=1e-5)
    assert variation(LOADS)[:2] == pytest.approx([0, 3**0.5], rel=1e-5), "even, and collapsed"


def test_entropy_is_that_of_torchs_categorical_over_that_of_even_use() -> None:
    shares = LOADS / LOADS.sum(1, keepdim=True)
    expected = torch.distributions.Categorical(shares).entropy() / math.log(4)
    assert entropy(LOADS) == pytest.approx(expected.tolist(), abs=1e-5)


def load_of(tokens: list[list[int]], devices: list[list[int]], dropped: list[int]) -> ExpertLoad:
    tokens_LE, devices_LP = torch.tensor(tokens).double(), torch.tensor(devices).double()
    rows_LP, z_L = devices_LP // 2, torch.linspace(1, 2, len(tokens), dtype=torch.float64)
    return ExpertLoad(tokens_LE, devices_LP, torch.tensor(dropped), z_L, rows_LP, rows_LP)


def test_a_step_tells_the_share_of_choices_that_found_their_expert_full() -> None:
    load = load_of([[6, 2], [4, 4]], [[8], [8]], [2, 0])
    moe = MoEConfig(n_experts=2, top_k=1, expert_width=8, capacity_factor=1.0)
    row = expert_metrics(load, moe, sampled=False)
    assert row["dropped"] == 2 / 16
    assert row["dropped_by_layer"] == [2 / 8, 0]
    assert expert_metrics(None, None, sampled=True) == {"expert_balance": [], "expert_entropy": [], "dropped": 0.0}


def test_a_step_tells_how_even_groups_are_where_there_are_some() -> None:
    load = load_of([[6, 2, 1, 3]], [[12]], [0])
    grouped = MoEConfig(n_experts=4, top_k=2, expert_width=8, n_groups=2, top_k_groups=2)
    assert expert_metrics(load, grouped, sampled=False)["group_balance"] == [pytest.approx(8 / 6, rel=1e-5)]
    plain = expert_metrics(load, MoEConfig(n_experts=4, top_k=2, expert_width=8), sampled=False)
    assert not {"group_balance", "dropped_by_layer", "device_balance", "rows_sent", "expert_load"} & set(plain)


def test_a_step_tells_what_devices_that_share_experts_have_to_do() -> None:
    load = load_of([[6, 2, 1, 3], [2, 2, 2, 2]], [[8, 4], [4, 4]], [0, 0])
    moe = MoEConfig(n_experts=4, top_k=2, expert_width=8)
    row = expert_metrics(load, moe, sampled=True)
    assert row["device_balance"] == [pytest.approx(8 / 6, rel=1e-5), 1]
    assert row["device_cv"] == [pytest.approx(2 / 6, rel=1e-5), 0]
    assert row["rows_sent"] == [[4, 2], [2, 2]]
    assert row["bytes_sent"] == [6, 4]
    assert row["expert_load"] == [[6, 2, 1, 3], [2, 2, 2, 2]]
    assert row["device_load"] == [[8, 4], [4, 4]]
    assert "device_load" not in expert_metrics(load, moe, sampled=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_a_machines(dtype: torch.dtype) -> None:
    assert 1e9 < matmul_peak(torch.device("cpu"), dtype, seconds=0.01) < 1e15


def test_workers_that_share_cores_have_their_part_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cores = torch.device("cpu"), usable_cores()
    monkeypatch.setattr(metrics, "matmul_peak", lambda device, dtype: 60.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert worker_peak(cpu, torch.float32, cores) == 60.0
        assert 4 * cores * worker_peak(cpu, torch.float32, 4 * cores) == pytest.approx(cores * 60.0)
    finally:
        torch.set_num_threads(threads)


def test_what_an_older_generation_still_writes_does_not_count(tmp_path: Path) -> None:
    """It looked, was still the newest, and wrote its row while the newer one was resuming from step 2."""
    rows = [{"step": step, "generation": 1} for step in (1, 2, 3)]
    rows += [{"resumed_from": 2, "generation": 2}, {"step": 4, "generation": 1}, {"step": 3, "generation": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(row["step"], row["generation"]) for row in read_metrics(tmp_path)] == [(1, 1), (2, 1), (3, 2)]


def test_a_resume_reads_the_end_of_the_file_alone(tmp_path: Path) -> None:
    """4 GiB that nobody reads, for they are a hole: all but the last step is as far back."""
    write(tmp_path, range(1, 10))
    path = tmp_path / "metrics.jsonl"
    with open(path, "ab") as file:
        file.truncate(4 << 30)
        file.seek(0, os.SEEK_END)
        file.write(b"\n")
    write(tmp_path, range(10, 13))
    assert path.stat().st_blocks * 512 < 1 << 20
    MetricsLog(tmp_path, 12, 2)
    MetricsLog(tmp_path, 11, 3)
    MetricsLog(tmp_path, 11, 4)
    with open(path, "rb") as file:
        file.seek(-200, os.SEEK_END)
        tail = [json.loads(line) for line in file.read().splitlines()[-2:]]
    assert tail == [{"step": 12, "loss": 1 / 12}, {"resumed_from": 11, "generation": 3}]


def test_a_long_row_does_not_hide_those_before_it(tmp_path: Path) -> None:
    """Where the last megabyte holds no row that can be read, any step may have been reached."""
    write(tmp_path, range(1, 4))
    write(tmp_path, range(4, 5), generation=2, note="x" * (1 << 20))
    write(tmp_path, range(3, 4), generation=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_row_of_an_older_generation_at_the_end_does_not_hide_what_was_reached(tmp_path: Path) -> None:
    rows = [*({"step": step, "generation": 2} for step in (1, 2, 3, 4)), {"step": 2, "generation": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path, range(3, 4), generation=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_line_that_is_no_row_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": \xff}\n[1]\n{"step": 2}\n')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
