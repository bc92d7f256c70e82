"""Compressed streams: windows of any size, and bounded memory for what grows a thousandfold."""

import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from moray import UserError
from moray.data.reading.account import Account
from moray.data.reading.compression import decompressed
from moray.data.reading.documents import read_documents
from moray.data.reading.rules import Rules

Read = Callable[..., Any]


def long_frame(content: bytes) -> bytes:
    """A zstd frame as `zstd --long=31` begins it (RFC 8878, 3.1.1): a window of 2 GiB, content stored as it is."""
    window = (31 - 10) << 3
    block = struct.pack("<I", len(content) << 3 | 1)[:3]
    return b"\x28\xb5\x2f\xfd" + b"\0" + bytes([window]) + block + content


def test_a_zstd_window_of_any_size_is_read(tmp_path: Path, read: Read) -> None:
    frame = long_frame(b'{"text": "far back"}\n')
    assert zstandard.get_frame_parameters(frame).window_size == 1 << 31
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress(frame)
    (tmp_path / "rows.jsonl.zst").write_bytes(frame)
    assert read(tmp_path / "rows.jsonl.zst").texts == {"rows.jsonl.zst:1": "far back"}


@pytest.mark.parametrize(("module", "name"), [("zstandard", "b.jsonl.zst"), ("pyarrow.parquet", "b.parquet")])
def test_a_package_that_is_not_installed_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / name).write_bytes(b"whatever")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs {module}: pip install 'moray-train\[formats\]'"):
        read_documents([tmp_path], Account(Rules(on_damage="skip")))


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_damage_is_met_only_where_it_is(compression: str) -> None:
    lines = b"".join(b"%d\n" % (n * 7919) for n in range(20_000))
    if compression == ".gz":
        compressor = zlib.compressobj(wbits=31)
        packed = compressor.compress(lines) + compressor.flush(zlib.Z_SYNC_FLUSH)  # all of it, and no end
    else:
        compressor = zstandard.ZstdCompressor().compressobj()
        packed = compressor.compress(lines) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    file = decompressed(io.BufferedReader(io.BytesIO(packed)), compression)
    assert b"".join(file.readline() for _ in range(20_000)) == lines
    with pytest.raises(EOFError):
        file.readline()
