"""Inputs a hundred times and more above the limit, read by a process of its own whose peak is measured."""

import gzip
import io
import json
import random
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

LIMIT = 1 << 20
ROOM = 128 << 20  # for a record of four limits, as bytes, as text and parsed, and for what the allocator keeps
HUGE = 128 << 20

# The peak of this process alone: getrusage would give the one of the process that began it, where that was higher.
CHILD = """
import sys
from pathlib import Path
from moray.data.reading.account import Account
from moray.data.reading.documents import read_documents
from moray.data.reading.rules import Rules
import pyarrow.parquet, zstandard

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10

before = peak()
account = Account(Rules(max_document_bytes=int(sys.argv[2]), long_documents=sys.argv[3], max_bad=0))
n_bytes = n_documents = 0
for document in read_documents([sys.argv[1]], account):
    n_documents, n_bytes = n_documents + 1, n_bytes + len(document.text)
    assert len(document.text) <= int(sys.argv[2])
print(n_documents, n_bytes, sum(account.counts.values()), peak() - before)
"""


def peak_of(source: Path, long_documents: str = "cut") -> tuple[int, int, int]:
    """How many documents, bytes and losses reading gives; asserts that it stays within ROOM."""
    command = [sys.executable, "-c", CHILD, str(source), str(LIMIT), long_documents]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    n_documents, n_bytes, n_losses, growth = map(int, done.stdout.split())
    assert growth < ROOM
    return n_documents, n_bytes, n_losses


def repeated(unit: bytes, n_bytes: int = HUGE) -> Iterator[bytes]:
    block = unit * ((1 << 20) // len(unit))
    yield from (block for _ in range(n_bytes // len(block)))


@pytest.mark.parametrize("long_documents", ["cut", "drop"])
def test_one_document_of_any_length(tmp_path: Path, long_documents: str) -> None:
    with gzip.open(tmp_path / "long.txt.gz", "wb", compresslevel=1) as file:
        file.writelines(repeated(b"a line of text.\n"))
    expected = {"cut": (HUGE // LIMIT, HUGE, 1), "drop": (0, 0, 1)}
    assert peak_of(tmp_path / "long.txt.gz", long_documents) == expected[long_documents]


@pytest.mark.parametrize("name", ["rows.jsonl.zst", "rows.json.gz"])
def test_one_record_of_any_length(tmp_path: Path, name: str) -> None:
    """The first of two, a gigabyte in 33 kB of zstd; then one that is read."""
    row = b'{"text": "short"}'
    zstd = name.endswith(".zst")
    with zstandard.open(tmp_path / name, "wb") if zstd else gzip.open(tmp_path / name, "wb", 1) as file:
        file.write(b"[" * (".json." in name) + b'{"text": "')
        for block in repeated(b"a", 8 * HUGE if zstd else HUGE // 2):
            file.write(block)
        file.write(b'"},\n' + row + b"]" if ".json." in name else b'"}\n' + row)
    assert peak_of(tmp_path / name) == (1, 5, 1)


def test_a_tar_of_members_of_any_length(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz", compresslevel=1) as archive:
        for name in ("a.txt", "b.jpg", "c.json"):
            info = tarfile.TarInfo(name)
            info.size = HUGE // 2
            archive.addfile(info, io.BufferedReader(_Zeros(info.size)))
    # Its letters are all NUL, and every piece becomes empty.
    n_documents, _, n_losses = peak_of(tmp_path / "set.tar.gz")
    assert n_documents == 0
    assert n_losses > 2


class _Zeros(io.RawIOBase):
    def __init__(self, size: int) -> None:
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        n = min(len(buffer), self._left)
        buffer[:n] = b"\0" * n
        self._left -= n
        return n


def test_a_parquet_file_of_long_rows(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [rng.randbytes(LIMIT // 4).hex() for _ in range(300)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, write_batch_size=4)
    assert peak_of(path) == (300, 300 * LIMIT // 2, 0)


def test_very_many_records(tmp_path: Path) -> None:
    row = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb", compresslevel=1) as file:
        file.writelines(repeated(row, HUGE // 2))
    n_documents, n_bytes, n_losses = peak_of(tmp_path / "rows.jsonl.gz")
    assert (n_bytes, n_losses) == (1000 * n_documents, 0)
