"""Which files a source holds: every known format in a folder, and what is not read by name."""

import gzip
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from moray import UserError
from moray.data.reading.account import Account
from moray.data.reading.documents import read_documents
from moray.data.reading.formats import Format, format_of
from moray.data.reading.rules import Rules

Read = Callable[..., Any]


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_a_folder_is_read_for_every_known_format(tmp_path: Path, read: Read) -> None:
    """As data sets are published: a page about them, and shards of all kinds in a folder below."""
    folder = tmp_path / "set"
    row = json.dumps({"text": "row"}).encode()
    write(folder / "README.md", b"a page")
    write(folder / "data" / "a.jsonl", row)
    write(folder / "data" / "b.jsonl.gz", gzip.compress(row))
    write(folder / "data" / "c.json", b"[" + row + b"]")
    write(folder / "data" / "d.txt.gz", gzip.compress(b"text"))
    write(folder / "data" / "E.TXT", b"upper case")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"]}), folder / "data" / "f.parquet")
    write(tmp_path / "member.txt", b"member")
    for name in ("g.tar", "h.tar.gz", "i.tgz"):
        with tarfile.open(folder / "data" / name, "w:gz" if "gz" in name else "w") as archive:
            archive.add(tmp_path / "member.txt", "000.txt")
    write(folder / "sub" / "j.rst", b"rst")
    write(folder / "sub" / "k.py", b"py")
    assert read(folder).texts == {
        "set/README.md": "a page",
        "set/data/a.jsonl:1": "row",
        "set/data/b.jsonl.gz:1": "row",
        "set/data/c.json:1": "row",
        "set/data/d.txt.gz": "text",
        "set/data/E.TXT": "upper case",
        "set/data/f.parquet:1": "row",
        "set/data/g.tar:000": "member",
        "set/data/h.tar.gz:000": "member",
        "set/data/i.tgz:000": "member",
        "set/sub/j.rst": "rst",
        "set/sub/k.py": "py",
    }


def test_what_a_folder_holds_and_is_not_read_is_named(tmp_path: Path, read: Read) -> None:
    folder = tmp_path / "notes"
    for name in ("a.txt", "b.jpg", "c.parquet.gz", "d", ".e.txt", ".git/f.txt", "sub/g.html"):
        write(folder / name, b"text")
    (folder / "broken.md").symlink_to("nowhere")
    (folder / "elsewhere").symlink_to(tmp_path, target_is_directory=True)
    outcome = read(folder)
    assert outcome.texts == {"notes/a.txt": "text"}
    unread = {loss.place.removeprefix(f"{folder}/") for loss in outcome.account.named["not read"]}
    assert unread == {"b.jpg", "c.parquet.gz", "d", ".e.txt", ".git/", "sub/g.html", "broken.md", "elsewhere/"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("notes.v2.txt", Format("text")),
        ("c4-train.00000-of-01024.json.gz", Format("json", ".gz")),
        ("A.NDJSON.XZ", Format("jsonl", ".xz")),
        ("set.tar.bz2", Format("tar", ".bz2")),
        ("set.TGZ", Format("tar", ".gz")),
        ("rows.jsonl.zst", Format("jsonl", ".zst")),
        ("rows.parquet", Format("parquet")),
        ("rows.parquet.gz", None),
        ("rows.gz", None),
        ("txt", None),
        ("rows.jsonl.gz.gz", None),
    ],
)
def test_the_format_by_the_name(name: str, expected: Format | None) -> None:
    assert format_of(name) == expected


def test_sources_of_one_name_keep_their_keys_when_others_are_added(tmp_path: Path, read: Read) -> None:
    for parent in ("x", "y"):
        write(tmp_path / parent / "src" / "a.py", parent.encode())
    first, second = tmp_path / "x" / "src", tmp_path / "y" / "src"
    assert read(first).texts == {"src/a.py": "x"}
    assert read(first, second).texts == {"src/a.py": "x", "src#2/a.py": "y"}


def test_bad_sources_are_found_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "pages" / "a.html", b"<p>")
    write(tmp_path / "rows.pdf", b"%PDF")
    for sources, message in [
        (["stdlib", tmp_path / "nowhere"], "nowhere' does not exist"),
        ([], "no source"),
        ([tmp_path / "empty"], "empty' holds no documents: no file of a known format"),
        ([tmp_path / "pages"], r"pages' holds no documents: no file of a known format \(.py .md .*found a.html"),
        ([tmp_path / "rows.pdf"], r"rows.pdf' has no known format; one of: .py .md .rst .txt .jsonl"),
    ]:
        with pytest.raises(UserError, match=message):
            read_documents(sources, Account(Rules()))
