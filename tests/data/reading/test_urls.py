"""Sources behind URLs: the same documents as on this machine, and a storage that fails is no damaged file."""

import gzip
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from moray.data.reading import pieces
from moray.data.reading.account import Account
from moray.data.reading.documents import Document, read_documents, read_piece
from moray.data.reading.pieces import pieces_of
from moray.data.reading.rules import Rules
from moray.data.reading.sources import find


class Ranges(SimpleHTTPRequestHandler):
    """As most servers do, and Python's own does not, it sends a part of a file when asked for one."""

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        start, stop = self.headers.get("Range", f"bytes=0-{len(content) - 1}")[6:].split("-")
        part = content[int(start) : int(stop) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{stop}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deep" / ".git").mkdir(parents=True)
    rows = [{"id": f"id-{n}", "text": f"text {n} " + "x" * 90} for n in range(200)]
    (folder / "lines.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, rows))))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress((folder / "lines.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "deep" / "rows.parquet", row_group_size=20)
    (folder / "deep" / "page.md").write_text("a page")
    (folder / "deep" / ".git" / "hidden.md").write_text("hidden")
    (folder / "picture.png").write_bytes(b"")
    return folder


@pytest.fixture
def in_memory(corpus: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.put(str(corpus), "/bucket/corpus", recursive=True)
    yield "memory://bucket/corpus"
    fs.rm("/bucket", recursive=True)


@pytest.fixture
def server(corpus: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(corpus))) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def read(source: str | Path) -> tuple[list[Document], Account]:
    account = Account(Rules())
    return sorted(read_documents([source], account), key=lambda document: document.key), account


def test_a_folder_at_a_url_is_that_of_this_machine(corpus: Path, in_memory: str) -> None:
    here, account = read(corpus)
    for url in (in_memory, in_memory + "/", f"file://{corpus}"):
        there, of_url = read(url)
        assert there == here
        assert of_url.counts == account.counts
        assert len(there) == 601
    there, _ = read(f"{in_memory}/deep/page.md")
    assert there == [Document("page.md", "a page")]


def test_a_file_of_a_server_is_read_in_pieces(corpus: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 12)
    for name in ("lines.jsonl", "deep/rows.parquet", "packed.jsonl.gz"):
        (source,) = find([f"{server}/{name}"])
        parts = list(pieces_of(source.files[0]))
        assert (len(parts) > 1) == (not name.endswith(".gz"))
        account = Account(Rules())
        there = [document for piece in parts for document in read_piece(piece, account)]
        assert sorted(there, key=lambda document: document.key) == read(corpus / name)[0]


def test_a_storage_that_fails_ends_the_reading_whatever_damage_is_borne(in_memory: str) -> None:
    account = Account(Rules(on_damage="skip"))
    documents = read_documents([in_memory], account)
    fsspec.filesystem("memory").rm("/bucket/corpus/lines.jsonl")
    with pytest.raises(ValueError, match=r"memory:///bucket/corpus/lines.jsonl cannot be read"):
        list(documents)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere", "source 'memory://nowhere' does not exist"),
        ("nothing://x/y.txt", "nothing://x/y.txt is no URL that can be used here .*nothing"),
        ("http://127.0.0.1:9/x.txt", "source 'http://127.0.0.1:9/x.txt' (cannot be|does not exist)"),
        ("file:///nowhere", "source 'file:///nowhere' does not exist"),
    ],
)
def test_urls_that_cannot_be(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find([url])


def test_what_a_file_is_known_by_changes_with_it(in_memory: str, corpus: Path) -> None:
    fs = fsspec.filesystem("memory")
    for source, change in (
        (f"{in_memory}/deep/page.md", lambda: fs.pipe("/bucket/corpus/deep/page.md", b"b page")),
        (corpus / "deep" / "page.md", lambda: (corpus / "deep" / "page.md").write_text("b page")),
    ):
        (before,), (same,) = find([source])[0].files, find([source])[0].files
        change()
        (after,) = find([source])[0].files
        assert before == same != after
    with pytest.raises(ValueError, match="is not there as it was found; let it be while it is read"):
        before.check()


def test_no_format_is_known_of_it(in_memory: str) -> None:
    with pytest.raises(ValueError, match=r"'memory://bucket/corpus/picture.png' has no known format"):
        find([f"{in_memory}/picture.png"])


def test_a_server_that_says_when_a_file_changed_is_believed(server: str, corpus: Path) -> None:
    os.utime(corpus / "deep" / "page.md", (0, 0))
    (file,) = find([f"{server}/deep/page.md"])[0].files
    assert file.version == "Last-Modified=Thu, 01 Jan 1970 00:00:00 GMT"
    assert file.digest() == hashlib.sha256(b"a page").hexdigest()
