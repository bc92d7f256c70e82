"""What of a run's events counts as a mishap, and what it cost, by sequences as the launchers write them."""

from typing import Any

from moray.jobs.report.mishaps import UNTOLD, Mishap, mishaps


def found(*events: dict[str, Any] | str, undone: dict[int, tuple[int, int]] | None = None) -> list[Mishap]:
    """Of events of these kinds, a second apart."""
    written = [{"kind": event} if isinstance(event, str) else event for event in events]
    return mishaps([{"time": 1_800_000_000 + at, **event} for at, event in enumerate(written)], undone or {})


def test_what_was_asked_for_is_none() -> None:
    """A stop and its resume; another number of workers; a node that leaves."""
    assert found("start", "begin", "ready", "stop", "end", "start", {"kind": "resume", "step": 5}, "ready", "end") == []
    (resized,) = found("start", "begin", "ready", {"kind": "resize", "workers": [2, 4]}, "start", "resume", "ready")
    assert (resized.is_fault, resized.what[:14]) == (False, "2 -> 4 workers")
    (left,) = found("start", "begin", "ready", {"kind": "leaving", "node": "n1"}, "start", "resume", "ready")
    assert (left.is_fault, left.where) == (False, "n1")


def test_torchrun_tells_of_a_recovery_alone() -> None:
    resume, recovered = {"kind": "resume", "step": 4, "generation": 2}, {"kind": "recovered", "seconds": 3.5}
    (one,) = found("start", "begin", "ready", "start", resume, recovered, "end", undone={2: (5, 9)})
    assert (one.what, one.step, one.resumed, one.lost, one.seconds) == (UNTOLD, 9, 4, 5, 3.5)


def test_a_fault_before_all_were_at_work_again_is_another_one() -> None:
    """What both undid is computed again once, by the third generation."""
    fault = {"kind": "fault", "reason": "was killed", "rank": 0, "node": "n1", "step": 9}
    first, second = found(
        *("start", "begin", "ready", fault, "start", {"kind": "resume", "step": 4, "generation": 2}),
        *({**fault, "step": None}, "start", {"kind": "resume", "step": 4, "generation": 3}),
        {"kind": "recovered", "seconds": 8.0},
        undone={3: (5, 9)},
    )
    assert (first.step, first.resumed, first.lost, first.seconds) == (9, 4, 0, None)
    assert (second.step, second.resumed, second.lost, second.seconds) == (9, 4, 5, 8.0)


def test_the_last_fault_of_a_run_that_failed_stays_open() -> None:
    (one,) = found("start", "begin", "ready", {"kind": "fault", "reason": "out of memory", "node": "n1"}, "end")
    assert (one.when, one.where, one.step, one.lost, one.seconds) == ("2027-01-15 08:00:03", "n1", None, None, None)


def test_an_edited_event_is_its_kind() -> None:
    assert [one.what for one in found("commit_refused", {"kind": "straggler", "ranks": [3], "time": "noon"})] == [
        "commit_refused",
        "straggler",
    ]
