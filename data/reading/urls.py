"""Sources behind an fsspec URL: what is there, and reading it.

A storage that does not answer is no damaged file: skipping it would give another dataset next time.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from moray import UserError
from moray.data.reading.compression import BUFFER_BYTES
from moray.data.reading.records import in_one_line

VERSIONS = (
    *("ETag", "etag", "generation", "Content-MD5", "content_md5", "Digest", "blob_id", "sha"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "modified", "updated", "modify", "created"),
)
"""What file systems say of a file that changes with its content."""


@dataclass(frozen=True)
class Entry:
    """A file: its URL, its path within the source (empty where it is the source), its size, and what tells when it
    changes.
    """

    url: str
    within: str
    size: int
    version: str


def is_url(source: str | Path) -> bool:
    return "://" in str(source)


def local_path(url: str) -> Path | None:
    """The path that a file:// URL means; None of any other. Raises UserError for a URL that nothing can read."""
    fs, root = file_system(url)
    return Path(root) if isinstance(fs, LocalFileSystem) else None


def entries(url: str) -> list[Entry]:
    """The file, or all files below the folder, in an order that is always the same.

    Raises UserError where there is nothing, or the storage does not tell what is there.
    """
    fs, root = file_system(url)
    try:
        info = fs.info(root)
        found = {root: info} if info["type"] == "file" else fs.find(root, detail=True)
    except FileNotFoundError:
        raise UserError(f"source {url!r} does not exist") from None
    except Exception as error:  # of whatever library the storage has
        raise UserError(f"source {url!r} cannot be listed ({in_one_line(error)})") from error
    names = sorted((name for name in found if not name.endswith("/")), key=lambda name: name.split("/"))
    return [_entry(fs, root, name, found[name]) for name in names]


def open_url(url: str) -> io.BufferedReader:
    """Raises UserError, then and while it is read, where the storage does not answer."""
    return io.BufferedReader(_Remote(url), BUFFER_BYTES)


def file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """What reads a URL or a path, and the path in it. Raises UserError for one that nothing can read here."""
    try:
        fs, root = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url} is no URL that can be used here ({in_one_line(error)})") from None
    return fs, root.rstrip("/")


def _entry(fs: AbstractFileSystem, root: str, name: str, info: Mapping[str, Any]) -> Entry:
    url = fs.unstrip_protocol(name)
    if info.get("size") is None:
        raise UserError(f"{url}: its server does not say how large it is; download it, and give the file")
    version = ", ".join(f"{field}={info[field]}" for field in VERSIONS if info.get(field) is not None)
    return Entry(url, name.removeprefix(root).strip("/"), int(info["size"]), version)


class _Remote(io.RawIOBase):
    def __init__(self, url: str) -> None:
        self._url = url
        self._file: Any = self._asked(lambda: file_system(url)[0].open(url, "rb"))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._asked(lambda: self._file.read(len(buffer)))
        buffer[: len(block)] = block
        return len(block)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._asked(lambda: self._file.seek(offset, whence))

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    def _asked(self, what: Any) -> Any:
        try:
            return what()
        except Exception as error:  # of whatever library the storage has
            why = "the same command goes on from what is done, once the storage answers"
            raise UserError(f"{self._url} cannot be read ({in_one_line(error)}); {why}") from error
