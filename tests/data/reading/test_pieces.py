"""Files read piece by piece give what they give when they are read whole: documents, keys and losses."""

import gzip
import json
import random
from pathlib import Path

import pytest

from moray.data.reading import pieces
from moray.data.reading.account import Account
from moray.data.reading.documents import Document, read_documents, read_piece
from moray.data.reading.pieces import Piece, pieces_of
from moray.data.reading.rules import Rules
from moray.data.reading.sources import find


def by_pieces(path: Path) -> tuple[list[Document], Account, list[Piece]]:
    (source,) = find([path])
    found = [piece for file in source.files for piece in pieces_of(file)]
    account, documents = Account(Rules(max_bad=10**6)), []
    for piece in found:
        told: list[int] = []
        documents += read_piece(piece, account, told.append)
        assert sum(told) == piece.size
        assert min(told) >= 0
    return documents, account, found


def whole(path: Path) -> tuple[list[Document], Account]:
    account = Account(Rules(max_bad=10**6))
    return list(read_documents([path], account)), account


def lines(chance: random.Random) -> bytes:
    kinds = [b"", b"  ", b"{", b'{"body": 1}', *(json.dumps({"text": "é" * n}).encode() for n in (1, 5, 40, 300))]
    named = json.dumps({"text": "named", "id": "own"}).encode()
    return b"\n".join(chance.choices([*kinds, named], k=chance.randrange(1, 60)))


@pytest.mark.parametrize("size", [1, 20, 100, 1000])
@pytest.mark.parametrize("buffer", [16, 1 << 20])
def test_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, buffer: int) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", size)
    monkeypatch.setattr(pieces, "BUFFER_BYTES", buffer)
    path, n_pieces = tmp_path / "rows.jsonl", 0
    for seed in range(30):
        path.write_bytes(b'{"text": "first"}\n' + lines(random.Random(seed)) + b"\n" * (seed % 2))
        documents, account, found = by_pieces(path)
        expected, others = whole(path)
        assert documents == expected
        assert (account.counts, account.named, account.n_records) == (others.counts, others.named, others.n_records)
        assert sum(piece.size for piece in found) == path.stat().st_size
        n_pieces += len(found)
    assert n_pieces > 30 or size == 1000


def test_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.table({"text": [f"row {n}" for n in range(50)]}), path, row_group_size=7)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    documents, _, found = by_pieces(path)
    assert len(found) > 3
    assert documents == whole(path)[0]
    assert [document.key for document in documents] == [f"rows.parquet:{n}" for n in range(1, 51)]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.txt", "rows.json"])
def test_what_cannot_be_cut_is_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10)
    content = b'{"text": "one"}\n{"text": "two"}\n' * 20
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    documents, _, found = by_pieces(tmp_path / name)
    assert len(found) == 1
    assert documents == whole(tmp_path / name)[0]
