from datetime import datetime
from pathlib import Path

from moray.cluster.events import EventLog, read_events


def test_events_come_back_in_order_with_their_time(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run" / "events.jsonl")
    log.write("start", workers=4)
    log.write("fault", rank=2, reason="was killed by SIGKILL\nat noon — Zürich")
    first, second = read_events(log.path)
    assert (first["kind"], first["workers"]) == ("start", 4)
    assert second["reason"] == "was killed by SIGKILL\nat noon — Zürich"
    assert datetime.fromisoformat(first["iso"]).timestamp() == first["time"] <= second["time"]
    assert len(log.path.read_bytes().splitlines()) == 2


def test_half_a_line_left_by_a_crash_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write("start", workers=4)
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        log.write("end", code=0)
        kinds = [event["kind"] for event in read_events(path)]
        # Cut just before its newline, the line is whole: nothing of it was lost.
        assert kinds == (["start", "start", "end"] if cut == len(whole) - 1 else ["start", "end"])


def test_a_line_in_the_middle_of_a_character_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes('{"kind": "ü'.encode()[:-1])
    EventLog(path).write("start")
    assert [event["kind"] for event in read_events(path)] == ["start"]
