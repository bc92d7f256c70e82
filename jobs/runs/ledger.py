"""The ledger of a run: whether its committed history trained on every position of the stream once, in order.

events.jsonl says where each attempt began and what it committed; metrics.jsonl what each step trained on; a commit's
manifest which commit it goes on from. They are written apart and must agree.
"""

from itertools import pairwise
from pathlib import Path

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
    told = read_steps(run, lambda row: row.get("positions"))
    positions = {step: (pair[0], pair[1]) for step, pair in told.items() if pair}
    committed: list[tuple[int, str | None]] = [(0, None)]  # a step, and the digest of its commit
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
        elif event["kind"] in ("begin", "resume"):
            # An attempt may fall back behind a damaged commit; a kill may come between a commit and its event.
            committed = [earlier for earlier in committed if earlier[0] < step] + [(step, digest)]
            at = event.get("position")
            _, end = positions.get(step, (0, at if step else 0))  # a step without a line is told below
            if at != end:
                problems.append(f"resumed from step {step} at position {at}, but it ended at {end}")
    return problems + _step_problems(positions, committed[-1][0]) + _chain_problems(run, dict(committed))


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


def _step_problems(positions: dict[int, tuple[int, int]], last: int) -> list[str]:
    missing = [step for step in range(1, last + 1) if step not in positions]
    problems = [_without_line(steps) for steps in _runs(missing)]
    for step in range(1, last + 1):
        before = positions.get(step - 1) if step > 1 else (0, 0)
        if step not in positions or before is None:
            continue
        (first, _), (_, reached) = positions[step], before
        if first != reached:
            what = "skips" if first > reached else "repeats"
            problems.append(f"step {step} {what} positions {min(first, reached)} to {max(first, reached)}")
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
