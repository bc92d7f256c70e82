"""Histories written by hand: whole ones, and one for each way in which a ledger can be broken."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moray.jobs.runs.ledger import ledger_problems
from moray.parallel.checkpoint.checkpointer import Checkpointer
from moray.parallel.checkpoint.manifest import Manifest


def event(kind: str, step: int, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, **fields}


def trained(*steps: int, batch: int = 4) -> list[dict[str, Any]]:
    return [{"step": step, "positions": [(step - 1) * batch, step * batch]} for step in steps]


def problems(run: Path, events: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[str]:
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ledger_problems(run)


BEGIN = event("begin", 0, position=0)


def test_a_run_that_nobody_touched(tmp_path: Path) -> None:
    events = [{"kind": "start", "generation": 1}, BEGIN, event("commit", 2), event("commit", 4), {"kind": "end"}]
    assert problems(tmp_path, events, trained(1, 2, 3, 4)) == []


def test_a_kill_with_a_tail_that_nobody_committed(tmp_path: Path) -> None:
    events = [BEGIN, event("commit", 2), event("resume", 2, position=8), event("commit", 3)]
    rows = [*trained(1, 2, 3, 4, 5), {"resumed_from": 2, "generation": 2}, *trained(3)]
    assert problems(tmp_path, events, rows) == []
    assert problems(tmp_path, events[:2], trained(1, 2, 3)) == [], "before the resume"


def test_a_kill_before_the_first_commit(tmp_path: Path) -> None:
    rows = [*trained(1), {"resumed_from": 0, "generation": 2}, *trained(1, 2)]
    assert problems(tmp_path, [BEGIN, BEGIN, event("commit", 2)], rows) == []


def test_a_kill_between_a_commit_and_its_event(tmp_path: Path) -> None:
    events = [BEGIN, event("resume", 2, position=8), event("commit", 4)]
    assert problems(tmp_path, events, trained(1, 2, 3, 4)) == []


def test_a_damaged_commit_and_the_one_before_it_taken(tmp_path: Path) -> None:
    events = [BEGIN, event("commit", 2), event("commit", 4), event("resume", 2, position=8), event("commit", 4)]
    rows = [*trained(1, 2, 3, 4), {"resumed_from": 2, "generation": 2}, *trained(3, 4)]
    assert problems(tmp_path, events, rows) == []


def test_a_run_without_a_commit_has_nothing_to_answer_for(tmp_path: Path) -> None:
    assert problems(tmp_path, [BEGIN], trained(1, 3)) == []


@pytest.mark.parametrize(
    ("events", "rows", "problem"),
    [
        (
            [BEGIN, event("commit", 2), event("resume", 2, position=16), event("commit", 3)],
            [*trained(1, 2), {"step": 3, "positions": [16, 24]}],
            "resumed from step 2 at position 16, but it ended at 8; step 3 skips positions 8 to 16",
        ),
        (
            [BEGIN, event("commit", 3)],
            [*trained(1, 2), {"step": 3, "positions": [4, 8]}],
            "step 3 repeats positions 4 to 8",
        ),
        ([BEGIN, event("commit", 3)], trained(1, 3), "step 2 is committed, but metrics.jsonl has no line of it"),
        (
            [BEGIN, event("commit", 2), event("resume", 2, position=8), event("commit", 2)],
            trained(1, 2),
            "step 2 was committed after step 2",
        ),
        (
            [
                BEGIN,
                event("commit", 1, digest="a1"),
                event("resume", 1, position=4, digest="a1"),
                event("commit", 2, digest="b2", parent="a1"),
                event("commit", 3, digest="a3", parent="a2"),
            ],
            trained(1, 2, 3),
            "step 3 was committed as a child of another commit than that of step 2",
        ),
        (
            [BEGIN, event("commit", 4), event("resume", 2, position=8)],
            [{"resumed_from": 0, "generation": 2}, *trained(1)],
            "step 2 is committed, but metrics.jsonl has no line of it",
        ),
    ],
)
def test_what_is_broken_is_named(
    tmp_path: Path, events: list[dict[str, Any]], rows: list[dict[str, Any]], problem: str
) -> None:
    assert "; ".join(problems(tmp_path, events, rows)).startswith(problem)


def commit(run: Path, events: list[dict[str, Any]], *steps: int) -> None:
    """Commits of one more generation, noted in `events` as a run does."""
    checkpointer = Checkpointer(
        run / "checkpoints", keep=9, keep_every=None, on_event=lambda kind, fields: events.append(event(kind, **fields))
    )
    loaded = checkpointer.load({"w": torch.zeros(1)})
    at, digest = (loaded.step, loaded.manifest.digest) if loaded else (0, None)
    events.append(event("resume" if loaded else "begin", at, position=at * 4, digest=digest))
    for step in steps:
        checkpointer.save(step, {"w": torch.zeros(1)}, {})
    checkpointer.finish()


def test_the_commits_themselves_are_the_chain_that_the_log_tells_of(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    commit(tmp_path, events, 1, 2)
    commit(tmp_path, events, 3, 4)
    assert problems(tmp_path, events, trained(1, 2, 3, 4)) == []
    shutil.rmtree(tmp_path / "checkpoints" / "step-000000003")  # as pruning does
    assert problems(tmp_path, events, trained(1, 2, 3, 4)) == []
    manifest = tmp_path / "checkpoints" / "step-000000002" / "manifest.json"
    written = Manifest.from_json(manifest.read_text())
    manifest.write_text(replace(written, created="later").to_json())
    assert problems(tmp_path, events, trained(1, 2, 3, 4)) == [
        "the commit of step 2 is not the one that events.jsonl speaks of"
    ]
    manifest.write_text(written.to_json())
    manifest = tmp_path / "checkpoints" / "step-000000004" / "manifest.json"
    manifest.write_text(replace(Manifest.from_json(manifest.read_text()), parent="another").to_json())
    assert "the commit of step 4 does not go on from the one before it" in problems(
        tmp_path, events, trained(1, 2, 3, 4)
    )
