"""Sources end to end: what is read, what is left out and how that is told, and what stops a reading."""

import gzip
import hashlib
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from moray import UserError
from moray.data.reading.account import Account
from moray.data.reading.documents import read_documents
from moray.data.reading.rules import Rules

Read = Callable[..., Any]

GOOD = b'{"text": "good"}\n'


def test_a_text_file(tmp_path: Path, read: Read) -> None:
    (tmp_path / "a.txt").write_text("héllo")
    assert read(tmp_path / "a.txt").texts == {"a.txt": "héllo"}


def test_the_standard_library_without_its_tests(read: Read) -> None:
    documents, account = read("stdlib")
    source = Path(sysconfig.get_path("stdlib"), "json", "decoder.py").read_text()
    assert documents["stdlib/json/decoder.py"] == source
    assert "stdlib/LICENSE.txt" in documents
    assert not [key for key in documents if {"test", "tests", "idle_test", "site-packages"} & set(key.split("/"))]
    assert {key.rpartition(".")[2] for key in documents} <= {"py", "txt", "md", "rst"}
    assert 8e6 < sum(map(len, documents.values())) < 20e6
    assert set(account.counts) == {"empty"}


def test_bom_and_line_ends_are_no_part_of_a_text(tmp_path: Path, read: Read) -> None:
    plain = "eins\n\nzwei 三\n"
    folder = tmp_path / "d"
    folder.mkdir()
    windows = plain.replace("\n", "\r\n").encode()
    (folder / "plain.txt").write_text(plain)
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbf" + plain.encode())
    (folder / "crlf.txt").write_bytes(windows)
    (folder / "both.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + windows))
    (folder / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "\ufeff" + windows.decode()}).encode())
    assert set(read(folder).texts.values()) == {plain}
    assert len(read(folder).texts) == 5


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, read: Read) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "blank.txt").write_text(" \n\u200b\ufeff")
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'{"text": "caf\xe9"}\n{"text": "\\ud800"}\n{"text": ""}\n{"text": null}\n{"text": "fine"}\n')
    outcome = read(tmp_path)
    assert list(outcome.texts.values()) == ["good", "fine"]
    assert outcome.lost("bad records") == [
        "bad.txt: not UTF-8 (unexpected end of data, byte 4)",
        "rows.jsonl, line 1: not UTF-8 (invalid continuation byte, byte 14)",
        "rows.jsonl, line 2: not UTF-8 (half of a surrogate pair)",
    ]
    assert outcome.lost("empty") == ["blank.txt", "rows.jsonl, line 3", "rows.jsonl, line 4"]
    assert f"{'left out':<10} bad records: 3" in outcome.account.lines()
    assert f"{'':<12}{rows}, line 4" in outcome.account.lines()


def test_names_of_what_is_left_out_do_not_pile_up(tmp_path: Path, read: Read) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n' * 1000 + '{"text": "x"}')
    account = read(tmp_path / "rows.jsonl").account
    assert account.counts["empty"] == 1000
    assert len(account.named["empty"]) == 10
    assert account.lines()[-1].strip() == "and 990 more"


def test_the_bad_record_that_is_one_too_many_ends_the_reading(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b'{"text": "a\n' + b'{"body": "b"}\n' * 2)
    assert read(path, max_bad=3).account.counts == {"bad records": 3}
    with pytest.raises(
        UserError, match=r"line 4: no field 'text'.*more than max_bad=2 records are bad, .*line 2 the first; mend them"
    ):
        read(path, max_bad=2)
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: not JSON .*; more than max_bad=0 records are bad; mend"):
        read(path, max_bad=0)


def test_a_file_in_which_nothing_can_be_read_is_told_before_any_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD * 9)
    (tmp_path / "b.jsonl").write_bytes(b'{"content": "x", "meta": {"text": "y", "n": 1}}\n' * 3)
    with pytest.raises(
        UserError,
        match=r"b.jsonl: none of its first records can be read; line 1: no field 'text'; "
        r"found \['content', 'meta.n', 'meta.text'\]; name the right one with --text-field",
    ):
        read_documents([tmp_path], Account(Rules()))


def incompressible_lines() -> bytes:
    return b"".join(b'{"text": "%s"}\n' % hashlib.sha256(b"%d" % n).hexdigest().encode() for n in range(9999))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_file_stops_the_reading_or_is_named_and_skipped(tmp_path: Path, read: Read, suffix: str) -> None:
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    packed = pack(incompressible_lines())
    (tmp_path / f"b.jsonl{suffix}").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "c.jsonl").write_bytes(GOOD.replace(b"good", b"last"))
    message = rf"b.jsonl{suffix}: damaged or unreadable after [\d,]+ documents .*--on-damage skip"
    with pytest.raises(UserError, match=message):
        read(tmp_path)
    outcome = read(tmp_path, on_damage="skip")
    (damaged,) = outcome.lost("damaged files")
    n_documents = int(damaged.split(" after ")[1].split()[0].replace(",", ""))
    assert 1000 < n_documents < 9999
    assert len(outcome.texts) == n_documents + 2
    assert list(outcome.texts.values())[-1] == "last"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.parquet", b"PAR1 not really"),
        ("rows.tar", b"not a tar at all" * 100),
        ("rows.jsonl.gz", b"not gzip"),
        ("notes.txt.gz", gzip.compress(b"text", mtime=0)[:7]),
        ("rows.jsonl.zst", b"not zstd"),
        ("rows.jsonl", b""),
        ("rows.json", b'[{"text": "x"'),
        ("set.tar", b""),
    ],
)
def test_a_damaged_file_is_found_before_any_is_read(tmp_path: Path, read: Read, name: str, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / name).write_bytes(content)
    account = Account(Rules())
    with pytest.raises(UserError, match=rf"{name}: .*; mend or remove it, or go on without"):
        read_documents([tmp_path], account)
    outcome = read(tmp_path, on_damage="skip")
    assert list(outcome.texts.values()) == ["good"]
    assert outcome.account.counts["damaged files"] == 1


def test_long_documents_are_cut_or_dropped(tmp_path: Path, read: Read) -> None:
    paragraphs = [f"{n} " + "word " * (n % 50) for n in range(60)]
    text = "\n\n".join(paragraphs)
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "x" * 2048}))
    cut = read(tmp_path, max_document_bytes=2048)
    pieces = [piece for key, piece in cut.texts.items() if key.startswith(f"{tmp_path.name}/long.txt#")]
    assert "".join(pieces) == text
    assert pieces == [piece for key, piece in cut.texts.items() if "rows.jsonl:1#" in key]
    assert all(1024 <= len(piece) <= 2048 and piece.endswith("\n\n") for piece in pieces[:-1])
    assert cut.texts[f"{tmp_path.name}/rows.jsonl:2"] == "x" * 2048
    why = "into pieces of at most max_document_bytes=2,048"
    assert cut.lost("cut") == [f"long.txt: {why}", f"rows.jsonl, line 1: {why}"]
    drop = read(tmp_path, max_document_bytes=2048, long_documents="drop")
    assert list(drop.texts.values()) == ["x" * 2048]
    why = "more than max_document_bytes=2,048"
    assert drop.lost("too long") == [f"long.txt: {why}", f"rows.jsonl, line 1: {why}"]


def test_the_nul_bytes_that_a_crash_leaves_are_taken_off(tmp_path: Path, read: Read) -> None:
    (tmp_path / "notes.txt").write_bytes(b"as far as it got" + bytes(5000))
    (tmp_path / "rows.jsonl").write_bytes(GOOD + bytes(5000))
    outcome = read(tmp_path)
    assert list(outcome.texts.values()) == ["as far as it got", "good"]
    assert outcome.lost("cut") == ["notes.txt: NUL bytes at its end, as a crash leaves them"]
    assert outcome.lost("bad records") == ["rows.jsonl, line 2: NUL bytes, as a crash leaves where data was to come"]


def test_ids_may_be_empty_or_equal_or_anything(tmp_path: Path) -> None:
    ids = ["one", "one", "", None, 7, {"a": 1}, "x" * 1000, "\ud800"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": id, "text": f"text {n}"}) + "\n" for n, id in enumerate(ids, 1)))
    keys = [document.key.removeprefix("rows.jsonl:") for document in read_documents([rows], Account(Rules()))]
    assert keys == ["one", "one", "3", "4", "7", "6", "7", "\ud800"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"text_field": ""}, "text_field='' must name the field"),
        ({"max_document_bytes": 10}, "max_document_bytes=10 must be at least 1024"),
        ({"max_bad": -1}, "max_bad=-1 must be 0 or more"),
        ({"long_documents": "burn"}, "long_documents='burn' must be one of cut, drop"),
        ({"on_damage": "weep"}, "on_damage='weep' must be one of stop, skip"),
    ],
)
def test_rules_that_cannot_be(setting: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rules(**setting)
