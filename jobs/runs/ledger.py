"""The ledger of a run: whether its committed history trained on every position of the stream once, in order.

events.jsonl says where each attempt began and what it committed; metrics.jsonl what each step trained on. The two are
written apart and must agree.
"""

from pathlib import Path

from moray.cluster.events import read_events
from moray.jobs.training.metrics import read_metrics


def ledger_problems(run: Path) -> list[str]:
    """What is wrong with the committed history, a line each; an empty list: no gap and no repeat."""
    positions = {row["step"]: tuple(row["positions"]) for row in read_metrics(run)}
    committed = [0]
    problems = []
    for event in read_events(run / "events.jsonl"):
        step = event.get("step", 0)
        if event["kind"] == "commit":
            if step <= committed[-1]:
                problems.append(f"step {step} was committed after step {committed[-1]}")
            committed.append(step)
        elif event["kind"] in ("begin", "resume"):
            # An attempt may fall back behind a damaged commit; a kill may come between a commit and its event.
            committed = [earlier for earlier in committed if earlier < step] + [step]
            _, end = positions.get(step, (0, 0))
            if event["position"] != end:
                problems.append(f"resumed from step {step} at position {event['position']}, but it ended at {end}")
    return problems + _step_problems(positions, committed[-1])


def _step_problems(positions: dict[int, tuple[int, int]], last: int) -> list[str]:
    problems, reached = [], 0
    for step in range(1, last + 1):
        if step not in positions:
            problems.append(f"step {step} is committed, but metrics.jsonl has no line of it")
            continue
        first, end = positions[step]
        if first != reached:
            what = "skips" if first > reached else "repeats"
            problems.append(f"step {step} {what} positions {min(first, reached)} to {max(first, reached)}")
        reached = end
    return problems
