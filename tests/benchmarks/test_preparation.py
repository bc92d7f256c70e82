"""benchmarks/preparation.py: contenders are measured on one file, and keep of it what they should."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHOSEN = ("moray_reading", "moray_near", "moray_tokenizing")


def test_near_copies_are_what_is_dropped_and_all_is_measured(
    load: Callable[[str], Any],
    rows_of: Callable[..., Any],
    prose: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    benchmark = load("preparation")
    monkeypatch.setattr(benchmark, "CONTENDERS", {name: benchmark.CONTENDERS[name] for name in CHOSEN})
    rows = rows_of(benchmark, "preparation table", prose, "--mb", 0.1, "--rounds", 1)
    n, _ = benchmark.corpus([prose], tmp_path / "again.jsonl", 100_000, 3000)
    texts = [json.loads(line)["text"] for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    originals = {json.loads(line)["text"] for line in prose.read_text().splitlines()}
    n_originals = sum(text in originals for text in texts)
    assert 1 < n - n_originals < n / 4
    assert {row[0]: int(row[-1]) for row in rows} == {
        "moray, reading": n,
        "moray, near": n_originals,
        "moray, tokenizing": n,
    }
    assert all(float(cell) > 0 for row in rows for cell in row[1:4])
    assert "near-duplicates add " in capsys.readouterr().out
