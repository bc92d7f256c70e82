"""What a full disk, a crash or an editor leave in a file of JSON lines costs those lines and no others."""

import json
import shutil
from pathlib import Path

import pytest

from moray.cluster.events import EventLog, read_events
from moray.cluster.json_lines import JsonLines, read_lines


def test_what_has_no_room_waits_and_goes_before_what_comes_next(small_disk: Path) -> None:
    lines, ballast = JsonLines(small_disk / "log.jsonl"), small_disk / "ballast"
    rows = [{"step": step, "text": "ä" * 1500} for step in range(9)]
    assert all(lines.append(row) for row in rows[:3])
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    written = [lines.append(row) for row in rows[3:8]]  # one may still fit beside the others
    assert not any(written[-3:])
    with pytest.raises(OSError, match="No space left on device"):
        lines.flush_to_disk()
    EventLog(lines.path).write("of another process")
    found = list(read_lines(lines.path))
    assert found == rows[: len(found)], "half a line is none"
    ballast.unlink()
    assert lines.append(rows[8])
    lines.flush_to_disk()
    assert list(read_lines(lines.path)) == rows


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind": "\xff"',
        b"\xff\xfe\x00",
        b"[1]",
        b"null",
        b"1" * 5000,
        b"[" * 100_000,
        b'{"kind": "commit", "generation": "7"}',
        b'{"kind": "commit", "step": "10"}',
        b'{"kind": "resume", "position": [1]}',
        b'{"kind": 3}',
        b'{"generation": 9}',
    ],
    ids=range(11),
)
def test_a_line_that_is_no_event_costs_itself(tmp_path: Path, line: bytes) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("start", generation=1, rank=None, step=None)
    with open(log.path, "ab") as file:
        file.write(line + b"\n")
    log.write("end", code=0)
    assert [event["kind"] for event in read_events(log.path)] == ["start", "end"]


def test_a_byte_that_is_not_utf8_costs_a_character(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "layout": "tp\xff1"}\n')
    assert list(read_lines(tmp_path / "log.jsonl")) == [{"step": 1, "layout": "tp\ufffd1"}]


def test_a_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    lines, log = JsonLines(tmp_path / "run" / "rows.jsonl"), EventLog(tmp_path / "run" / "events.jsonl")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        lines.append({"step": 1})
    assert not log.write("fault")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    lines.append({"step": 2})
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [1, 2]
