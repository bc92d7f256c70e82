"""One reader a file format: each yields (name of the document within the file, its text or undecoded bytes), streaming.

A damaged file raises UserError naming the file and the place: nothing of a corpus is lost silently.
"""

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import IO, Any, TypeAlias

from moray import UserError

Raw: TypeAlias = tuple[str, str | bytes]  # the document's name, its text (bytes where nobody has decoded it yet)

TEXT_SUFFIXES = (".py", ".md", ".rst", ".txt")
PARQUET_BATCH_ROWS = 256
READ_BYTES = 1 << 20


class _ZstdReader(io.RawIOBase):
    """Decompresses any number of zstd frames; unlike zstandard's own reader, raises EOFError on a truncated one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._zstandard = _optional("zstandard", "a .zst file")
        self._file = file
        self._frame: Any = None
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            compressed = self._frame.unused_data if self._frame and self._frame.eof else b""
            if not compressed and not (compressed := self._file.read(READ_BYTES)):
                if self._frame and not self._frame.eof:
                    raise EOFError("the last zstd frame is incomplete")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            self._pending = memoryview(self._frame.decompress(compressed))
        n = min(len(buffer), len(self._pending))
        buffer[:n], self._pending = self._pending[:n], self._pending[n:]
        return n


def _optional(module: str, what: str) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise UserError(f"reading {what} needs {module}: pip install 'moray-train[formats]'") from None


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    file = open(path, "rb")  # noqa: SIM115
    return io.BufferedReader(_ZstdReader(file), READ_BYTES) if path.suffix.lower() == ".zst" else file


def _field(record: Any, place: str) -> str:
    """The string under `text`; raises UserError naming the place and what is there instead."""
    if not isinstance(record, dict) or "text" not in record:
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{place}: no field 'text'; found {found}")
    if not isinstance(record["text"], str):
        raise UserError(f"{place}: field 'text' must be a string, not {type(record['text']).__name__}")
    return record["text"]


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg}, character {error.pos + 1})") from None


def _name(record: dict[str, Any], number: int) -> str:
    name = record.get("id")
    return str(number if name is None else name)


def read_text(path: Path) -> Iterator[Raw]:
    """The whole file as one document, named by nothing (its key is the file's)."""
    with _open(path) as file:
        yield "", file.read()


def read_jsonl(path: Path) -> Iterator[Raw]:
    """A document a line, from field `text`, named by its `id` if it has one, else by its line number."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            try:
                record = _parse(line, place) if line.strip() else None
            except UnicodeDecodeError:
                yield str(number), line
                continue
            if record is not None:
                text = _field(record, place)
                yield _name(record, number), text


def read_parquet(path: Path) -> Iterator[Raw]:
    """A document a row, from column `text`, named by column `id` if there is one, else by its row number."""
    file = _optional("pyarrow.parquet", "a .parquet file").ParquetFile(path)
    names = file.schema_arrow.names
    if "text" not in names:
        raise UserError(f"{path}: no column 'text'; found {names}")
    number = 0
    for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=[name for name in ("text", "id") if name in names]):
        for record in batch.to_pylist():
            number += 1
            text = record["text"] if record["text"] is not None else ""
            yield _name(record, number), _field({"text": text}, f"{path}, row {number}")


def read_tar(path: Path) -> Iterator[Raw]:
    """A document a WebDataset sample: its `txt` member, or field `text` of its `json` member; others are left out."""

    def stem(member: tarfile.TarInfo) -> str:
        folder, slash, name = member.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    with tarfile.open(path, "r|") as archive:
        for key, members in groupby((member for member in archive if member.isfile()), stem):
            found: dict[str, bytes] = {}
            for member in members:
                suffix = member.name.rpartition(".")[2]
                if suffix in ("txt", "json"):
                    file = archive.extractfile(member)
                    assert file, "a regular file has content"
                    found[suffix] = file.read()
            if "txt" in found:
                yield key, found["txt"]
            elif "json" in found:
                try:
                    record = _parse(found["json"], f"{path}, member {key}.json")
                except UnicodeDecodeError:
                    yield key, found["json"]
                    continue
                yield key, _field(record, f"{path}, member {key}.json")


_READERS = {".jsonl": read_jsonl, ".parquet": read_parquet, ".tar": read_tar} | dict.fromkeys(TEXT_SUFFIXES, read_text)


def is_readable(path: Path) -> bool:
    """Whether the file's name ends in a format that `read_file` knows."""
    return _format(path) in _READERS


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in (".gz", ".zst") and suffixes[-2] in (".jsonl", ".txt"):
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def read_file(path: Path) -> Iterator[Raw]:
    """The documents of a file in any known format; raises UserError naming the file where it is damaged."""
    n = 0
    try:
        for document in _READERS[_format(path)](path):
            yield document
            n += 1
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{path}: damaged or unreadable after {n} documents ({error})") from error
    except Exception as error:
        # zstandard and pyarrow are optional, so their exceptions cannot be named above.
        if type(error).__module__.partition(".")[0] in ("zstandard", "pyarrow"):
            raise UserError(f"{path}: damaged or unreadable after {n} documents ({error})") from error
        raise
