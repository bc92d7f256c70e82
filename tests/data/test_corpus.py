"""Every source format, read from real files that other libraries wrote; and what a damaged or foreign file is told."""

import gzip
import hashlib
import io
import json
import sysconfig
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import webdataset
import zstandard

from moray.data.corpus import Skipped, read_documents

ROWS = [{"text": "one"}, {"id": "second", "text": "zwei\nzwei"}, {"text": "三"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(*sources: str | Path, skipped: Skipped | None = None) -> dict[str, str]:
    documents = list(read_documents(sources, skipped))
    assert len({document.key for document in documents}) == len(documents)
    return {document.key: document.text for document in documents}


def test_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    for name in ("b.md", "a.txt", "sub/c.rst", "sub/d.py", "sub/e.jpg", ".git/f.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"text of " + name.encode() + b"\r\n")
    (folder / "broken.md").symlink_to("nowhere")
    expected = {f"notes/{name}": f"text of {name}\r\n" for name in ("a.txt", "b.md", "sub/c.rst", "sub/d.py")}
    assert read(folder) == expected


def test_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("héllo")
    assert read(tmp_path / "a.txt") == {"a.txt": "héllo"}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    # A blank line, and a second gzip member or zstd frame, as appending makes them.
    for part in (LINES, b"\n" + json.dumps({"text": "last"}).encode()):
        packed = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix](part)
        with open(path, "ab") as file:
            file.write(packed)
    name = path.name
    assert read(path) == {f"{name}:1": "one", f"{name}:second": "zwei\nzwei", f"{name}:3": "三", f"{name}:5": "last"}


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {n}" for n in range(700)], "n": range(700)}), path)
    assert read(path) == {f"rows.parquet:{n + 1}": f"text {n}" for n in range(700)}
    pyarrow.parquet.write_table(pyarrow.table({"id": ["a", None], "text": ["x", None]}), path)
    assert read(path, skipped=(skipped := Skipped())) == {"rows.parquet:a": "x"}
    assert skipped.names == {"empty": ["rows.parquet:2"]}


def test_a_webdataset_tar(tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "d/0", "txt": "a text", "json": {"caption": "beside it"}})
        writer.write({"__key__": "d/1", "json": {"text": "from json"}, "jpg": b"\xff\xd8"})
        writer.write({"__key__": "d/2", "jpg": b"\xff\xd8"})
    assert read(path) == {"set.tar:d/0": "a text", "set.tar:d/1": "from json"}


def test_the_standard_library_without_its_tests() -> None:
    documents = read("stdlib")
    source = Path(sysconfig.get_path("stdlib"), "json", "decoder.py").read_text()
    assert documents["stdlib/json/decoder.py"] == source
    assert "stdlib/LICENSE.txt" in documents
    assert not [key for key in documents if {"test", "tests", "idle_test", "site-packages"} & set(key.split("/"))]
    assert 8e6 < sum(map(len, documents.values())) < 20e6


def test_sources_of_one_name_keep_their_keys_when_others_are_added(tmp_path: Path) -> None:
    for parent in ("x", "y"):
        (tmp_path / parent / "src").mkdir(parents=True)
        (tmp_path / parent / "src" / "a.py").write_text(parent)
    first, second = tmp_path / "x" / "src", tmp_path / "y" / "src"
    assert read(first) == {"src/a.py": "x"}
    assert read(first, second) == {"src/a.py": "x", "src#2/a.py": "y"}


def test_what_is_skipped_is_counted_and_named(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "blank.txt").write_text(" \n")
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'{"text": "caf\xe9"}\n{"text": "\\ud800"}\n{"text": ""}\n{"text": "fine"}\n')
    skipped = Skipped()
    assert list(read(tmp_path, rows, skipped=skipped).values()) == ["good", "fine"]
    name = tmp_path.name
    assert skipped.names == {
        "not UTF-8": [f"{name}/bad.txt", "rows.jsonl:1", "rows.jsonl:2"],
        "empty": [f"{name}/blank.txt", "rows.jsonl:3"],
    }
    assert skipped.counts == {"not UTF-8": 3, "empty": 2}


def test_names_of_skipped_documents_do_not_pile_up(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n' * 1000)
    skipped = Skipped()
    assert read(tmp_path / "rows.jsonl", skipped=skipped) == {}
    assert skipped.counts["empty"] == 1000
    assert len(skipped.names["empty"]) == 10


def incompressible_lines() -> bytes:
    return b"".join(b'{"text": "%s"}\n' % hashlib.sha256(b"%d" % n).hexdigest().encode() for n in range(9999))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_archive_is_an_error_and_not_a_shorter_corpus(tmp_path: Path, suffix: str) -> None:
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    packed = pack(incompressible_lines())
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=rf"rows.jsonl{suffix}: damaged or unreadable after \d+ documents"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.jsonl",
            LINES + b'{"body": "x", "n": 1}\n',
            r"rows.jsonl, line 4: no field 'text'; found \['body', 'n'\]",
        ),
        ("rows.jsonl", b'["a"]\n', "rows.jsonl, line 1: no field 'text'; found list"),
        ("rows.jsonl", b'{"text": 7}\n', "line 1: field 'text' must be a string, not int"),
        ("rows.jsonl", LINES + b'{"text": "ab\n', r"rows.jsonl, line 4: not JSON \(.*, character 13\)"),
        ("rows.parquet", b"PAR1 not really", "rows.parquet: damaged or unreadable"),
        ("rows.tar", b"not a tar at all" * 100, "rows.tar: damaged or unreadable"),
        ("rows.jsonl.gz", b"not gzip", "rows.jsonl.gz: damaged or unreadable"),
        ("rows.jsonl.zst", b"not zstd", "rows.jsonl.zst: damaged or unreadable"),
        ("rows.jsonl", b"", "rows.jsonl' holds no documents"),
        ("rows.pdf", b"%PDF", r"rows.pdf' has no known format; one of: .py .md .rst .txt .jsonl"),
    ],
)
def test_a_damaged_or_foreign_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_parquet_without_a_text_column_names_those_it_has(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet: no column 'text'; found \['body'\]"):
        read(tmp_path / "rows.parquet")


def test_a_tar_cut_inside_a_member_is_an_error(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for n in range(3):
            info = tarfile.TarInfo(f"{n}.txt")
            info.size = 5000
            archive.addfile(info, io.BytesIO(b"x" * 5000))
    (tmp_path / "set.tar").write_bytes(buffer.getvalue()[:9000])
    with pytest.raises(ValueError, match=r"set.tar: damaged or unreadable after 1 documents"):
        read(tmp_path / "set.tar")


def test_bad_sources_are_found_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="nowhere' does not exist"):
        read_documents(["stdlib", tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no source"):
        read_documents([])
    with pytest.raises(ValueError, match="empty' holds no documents"):
        read(tmp_path / "empty")
