"""JSON lines, arrays and objects, read from real files; a bad record of any kind costs itself alone."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from moray import UserError
from moray.data.reading.json_files import read_values
from moray.data.reading.records import Damage

Read = Callable[..., Any]

ROWS = [{"text": "one"}, {"id": "second", "text": "zwei\nzwei"}, {"text": "三"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", PACK)
def test_json_lines(tmp_path: Path, read: Read, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    # A blank line, and a second member or frame, as appending makes them.
    for part in (LINES, b"\n" + json.dumps({"text": "last"}).encode()):
        with open(path, "ab") as file:
            file.write(PACK[suffix](part))
    texts = {f"{path.name}:{name}": text for name, text in [("1", "one"), ("second", "zwei\nzwei"), ("3", "三")]}
    assert read(path).texts == texts | {f"{path.name}:5": "last"}


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array(tmp_path: Path, read: Read, indent: int | None) -> None:
    """Strings full of what ends elements, at every place of a block's end."""
    texts = ['say "[]{},\\" \\\\', "}]\\", "三" * 40_000, "\\" * 100_001, "x" * (1 << 20), ", [", "plain"]
    path = tmp_path / "rows.json"
    rows = [{"text": text, "meta": {"tags": ["a,b", [1, {"n": {}}]]}} for text in texts for _ in range(2)]
    path.write_text("\ufeff \n" + json.dumps(rows, indent=indent))
    assert list(read(path).texts.values()) == [row["text"] for row in rows]
    assert list(read(path).texts)[:2] == ["rows.json:1", "rows.json:2"]


def test_an_element_costs_itself_alone(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "rows.json"
    deep = b'{"text": "x", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    elements = [b'{"text": "a"}', b'{"text": "caf\xe9"}', deep, b'{"text": b}', b"7", b'{"text": "c"}']
    path.write_bytes(b"[" + b",\n".join(elements) + b"]\n")
    outcome = read(path)
    assert list(outcome.texts.values()) == ["a", "c"]
    assert [line.partition(": ")[::2] for line in outcome.lost("bad records")] == [
        ("rows.json, element 2", "not UTF-8 (invalid continuation byte, byte 14)"),
        ("rows.json, element 3", "nested too deeply"),
        ("rows.json, element 4", "not JSON (Expecting value, character 10)"),
        ("rows.json, element 5", "must be an object with a field 'text', not int"),
    ]


def test_an_array_that_does_not_end_is_damage(tmp_path: Path, read: Read) -> None:
    (tmp_path / "rows.json").write_bytes(json.dumps(ROWS).encode()[:-9])
    with pytest.raises(UserError, match=r"rows.json: the array does not end"):
        read(tmp_path / "rows.json")
    assert list(read(tmp_path / "rows.json", on_damage="skip").texts.values()) == ["one", "zwei\nzwei"]


def test_lines_or_an_object_in_a_json_file(tmp_path: Path, read: Read) -> None:
    (tmp_path / "c4.json").write_bytes(LINES + b'{"text": \n{"text": "last"}')
    (tmp_path / "first.json").write_bytes(json.dumps({"text": "x" * 5000}).encode() + b"\n" + LINES)
    (tmp_path / "page.json").write_text(json.dumps({"text": "a page", "n": 1}, indent=1))
    outcome = read(tmp_path, max_document_bytes=1024)
    name = tmp_path.name
    assert outcome.lost("too long") == ["first.json, line 1: a record of more than 4,096 bytes"]
    assert {key: text for key, text in outcome.texts.items() if "first" not in key} == {
        f"{name}/c4.json:1": "one",
        f"{name}/c4.json:second": "zwei\nzwei",
        f"{name}/c4.json:3": "三",
        f"{name}/c4.json:5": "last",
        f"{name}/page.json": "a page",
    }
    assert outcome.lost("bad records") == ["c4.json, line 4: not JSON (Expecting value, character 11)"]


def test_json_that_is_no_record_is_not_read(tmp_path: Path, read: Read) -> None:
    """As it lies in every folder: settings with and without comments, an index, a list of words."""
    contents = {
        "a.json": b'{"name": "x", "deep": {"n": 1}}',
        "b.json": b'{\n "name": "x"\n}\n',
        "c.json": b'["a", {"text": "b"}]',
        "d.json": b"7",
        "e.json": b"{\n // a comment\n}\n",
        "f.json": b"[]",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "g.txt").write_text("text")
    outcome = read(tmp_path)
    assert list(outcome.texts.values()) == ["text"]
    told = "no field 'text'; found ['deep.n', 'name']; name the right one with --text-field"
    assert outcome.lost("not read")[0] == f"a.json: {told}"
    assert [line.partition(":")[0] for line in outcome.lost("not read")] == ["a.json", "b.json", "c.json", "d.json"]
    assert [line.partition(" (")[0] for line in outcome.lost("bad records")] == ["e.json: not JSON"]
    with pytest.raises(UserError, match=r"a.json' holds no documents; not read: .*a.json: no field 'text'; found"):
        read(tmp_path / "a.json")


def test_a_list_of_records_with_another_field_is_told(tmp_path: Path, read: Read) -> None:
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "x", "output": "y"}] * 3))
    with pytest.raises(UserError, match=r"alpaca.json: none of its first records can be read; element 1: no field"):
        read(tmp_path)
    assert len(read(tmp_path, text_field="output").texts) == 3


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"body": "x", "n": 1}\n', "no field 'text'; found ['body', 'n']; name the right one with --text-field"),
        (b'["a"]\n', "must be an object with a field 'text', not list"),
        (b'{"text": 7}\n', "field 'text' must be a string, not int"),
        (b'{"text": ["a"]}\n', "field 'text' must be a string, not list"),
        (b'{"text": "a\xe9b"}\n', "not UTF-8 (invalid continuation byte, byte 12)"),
        (b"[" * 100_000 + b"\n", "nested too deeply"),
        (b'{"text": "ab\n', "not JSON (Invalid control character at, character 13)"),
        (
            b'{"text": "ab',
            "not JSON (Unterminated string starting at, character 10); the file ends in this line, it may have",
        ),
        (b"\0" * 99, "NUL bytes, as a crash leaves where data was to come"),
        (b'{"text"\0\0', "NUL bytes, as a crash leaves where data was to come"),
    ],
)
def test_a_bad_line_is_named_and_costs_itself_alone(tmp_path: Path, read: Read, line: bytes, why: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES + line)
    outcome = read(path)
    assert len(outcome.texts) == 3
    (told,) = outcome.lost("bad records")
    assert told.startswith(f"rows.jsonl, line 4: {why}")


def test_whatever_stands_beside_the_text_is_no_fault(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "n": %s, "x": NaN, "text ": [1]}\n{"text": "b", "n": -1e999}\n' % ("9" * 5000))
    assert list(read(path).texts.values()) == ["a", "b"]


def test_another_field(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"data": {"text": "a"}}, {"data.text": "b"}, {"data": None}, {"data": {"text": None}}, {"data": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = read(path, text_field="data.text")
    assert list(outcome.texts.values()) == ["a", "b"]
    assert outcome.lost("empty") == ["rows.jsonl, line 3", "rows.jsonl, line 4"]
    assert "line 5: no field 'data.text'; found ['data']" in outcome.lost("bad records")[0]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_record_beyond_any_size_costs_itself_alone(tmp_path: Path, read: Read, name: str) -> None:
    long = json.dumps({"text": "x", "blob": "y, [" * 2000})
    rows = ['{"text": "a"}', long, '{"text": "b"}', long]
    (tmp_path / name).write_text("\n".join(rows) if name.endswith("l") else "[" + ",".join(rows) + "]")
    outcome = read(tmp_path / name, max_document_bytes=1024)
    assert list(outcome.texts.values()) == ["a", "b"]
    assert [line.rpartition(": ")[2] for line in outcome.lost("too long")] == ["a record of more than 4,096 bytes"] * 2


def test_the_values_of_lines_come_with_their_numbers() -> None:
    lines = b'\xef\xbb\xbf{"a": 1}\n\n[2]\n'
    assert list(read_values(io.BufferedReader(io.BytesIO(lines)), 100)) == [(1, {"a": 1}), (3, [2])]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"a"\n', r"line 2: not JSON"),
        (b'"\xff"\n', "line 2: not UTF-8"),
        (b"1" * 200, "line 2: a record of more than"),
    ],
)
def test_a_line_without_a_value_is_damage(line: bytes, why: str) -> None:
    values = read_values(io.BufferedReader(io.BytesIO(b"{}\n" + line)), 100)  # type: ignore[arg-type]
    assert next(values) == (1, {})
    with pytest.raises(Damage, match=why):
        next(values)
