"""Compressed files as streams of bytes, whatever they grow to: what is held at a time is bounded."""

import io
from importlib import import_module
from typing import IO, Any

from moray import UserError

BUFFER_BYTES = 1 << 20
# zstd's least input may become 32,000 times as much at once, which no read of it can interrupt.
ZSTD_BYTES = 1 << 8
ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` makes, the format's largest
_STANDARD = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}  # imported when needed: not every Python is built with all


def decompressed(file: io.BufferedReader, compression: str) -> io.BufferedReader:
    """The bytes of `file` without its compression, one of those of `formats`, or none.

    Damage is met only where it is: whatever precedes it can be read by lines, or by `read1`.
    """
    if compression == ".zst":
        return io.BufferedReader(_ZstdReader(file))
    return import_module(_STANDARD[compression]).open(file, "rb") if compression else file


def optional(module: str, what: str) -> Any:
    """A module of the extra `formats`. what: it is for. Raises UserError that says how to install it."""
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"{what} needs {module}: pip install 'moray-train[formats]'") from None


class _ZstdReader(io.RawIOBase):
    """Decompresses any number of zstd frames; unlike zstandard's own reader, raises EOFError on a truncated one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._zstandard = optional("zstandard", "reading a .zst file")
        self._file = file
        self._frame: Any = None
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            compressed = self._frame.unused_data if self._frame and self._frame.eof else b""
            if not compressed and not (compressed := self._file.read(ZSTD_BYTES)):
                if self._frame and not self._frame.eof:
                    raise EOFError("the last zstd frame is incomplete")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
            self._pending = memoryview(self._frame.decompress(compressed))
        n = min(len(buffer), len(self._pending))
        buffer[:n], self._pending = self._pending[:n], self._pending[n:]
        return n
