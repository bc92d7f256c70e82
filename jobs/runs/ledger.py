"""The ledger of a run: whether its committed history trained on every position of the stream once, in order.

events.jsonl says where each attempt began and what it committed; metrics.jsonl what each step trained on, and what was
skipped before it; a commit's manifest which commit it goes on from. They are written apart and must agree.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

from moray.cluster.events import read_events
from moray.jobs.training.metrics import read_steps
from moray.parallel.checkpoint.commits import list_commits


def ledger_problems(run: Path) -> list[str]:
    """What is wrong with the committed history, a line each; an empty list: no gap and no repeat.

    Weights that no run trained have none.
    """
    log = run / "events.jsonl"
    if not log.exists():
        return []
    rows = _rows(run)
    committed: list[tuple[int, str | None]] = [(0, None)]  # a step, and the digest of its commit
    began: list[tuple[int, int | None]] = []  # a step, and the position at which an attempt went on from it
    problems = []
    for event in read_events(log):
        step, digest = event.get("step"), event.get("digest")
        if step is None:
            continue
        if event["kind"] == "commit":
            last, head = committed[-1]
            if step <= last:
                problems.append(f"step {step} was committed after step {last}")
            if event.get("parent") != head:
                problems.append(f"step {step} was committed as a child of another commit than that of step {last}")
            committed.append((step, digest))
        elif event["kind"] in ("begin", "resume", "rollback"):
            # An attempt may fall back behind a damaged commit; a kill may come between a commit and its event.
            committed = [earlier for earlier in committed if earlier[0] < step] + [(step, digest)]
            # What a rollback undid was another history.
            began = [earlier for earlier in began if earlier[0] <= step] + [(step, event.get("position"))]
    for step, at in began:
        # A step without a line is told below.
        end = rows[step]["positions"][1] if step in rows else at if step else 0
        if at != end:
            problems.append(f"resumed from step {step} at position {at}, but it ended at {end}")
    return problems + _step_problems(rows, committed[-1][0]) + _chain_problems(run, dict(committed))


def _chain_problems(run: Path, committed: dict[int, str | None]) -> list[str]:
    """Where the commits that are there are not those of the log, or not a chain."""
    manifests = [commit.manifest for commit in list_commits(run / "checkpoints")]
    problems = [
        f"the commit of step {manifest.step} is not the one that events.jsonl speaks of"
        for manifest in manifests
        if (known := committed.get(manifest.step)) and known != manifest.digest
    ]
    for before, after in pairwise(manifests):
        between = [digest for step, digest in committed.items() if before.step < step < after.step]
        if after.parent != (between[-1] if between else before.digest):
            problems.append(f"the commit of step {after.step} does not go on from the one before it")
    return problems


def _rows(run: Path) -> dict[int, dict[str, Any]]:
    """What the ledger needs of each step's row."""
    kept = ("step", "positions", "skipped")
    told = read_steps(run, lambda row: {name: row[name] for name in kept if name in row})
    return {step: row for step, row in told.items() if "positions" in row}


def skipped_positions(run: Path) -> list[str]:
    """What the committed and uncommitted steps have passed over, and why: a line each."""
    return [
        f"positions {first} to {end} were skipped before step {row['step']}: {why}"
        for row in _rows(run).values()
        for (first, end), why in _skipped(row)
    ]


def _skipped(row: dict[str, Any]) -> list[tuple[tuple[int, int], str]]:
    return [(tuple(window["positions"]), window["why"]) for window in row.get("skipped", [])]


def _step_problems(rows: dict[int, dict[str, Any]], last: int) -> list[str]:
    missing = [step for step in range(1, last + 1) if step not in rows]
    problems = [_without_line(steps) for steps in _runs(missing)]
    for step in range(1, last + 1):
        if step not in rows or (step > 1 and step - 1 not in rows):
            continue
        reached = rows[step - 1]["positions"][1] if step > 1 else 0
        for first, end in [*(window for window, _ in _skipped(rows[step])), rows[step]["positions"]]:
            if first != reached:
                what = "skips" if first > reached else "repeats"
                problems.append(f"step {step} {what} positions {min(first, reached)} to {max(first, reached)}")
            reached = end
    return problems


def _runs(numbers: list[int]) -> list[range]:
    """Ascending numbers as ranges of neighbours."""
    starts = [number for i, number in enumerate(numbers) if not i or numbers[i - 1] != number - 1]
    ends = [number + 1 for i, number in enumerate(numbers) if numbers[i + 1 : i + 2] != [number + 1]]
    return [range(*bounds) for bounds in zip(starts, ends, strict=True)]


def _without_line(steps: range) -> str:
    if len(steps) == 1:
        return f"step {steps[0]} is committed, but metrics.jsonl has no line of it"
    return f"steps {steps[0]} to {steps[-1]} are committed, but metrics.jsonl has no lines of them"
