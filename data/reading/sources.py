"""Which files the sources are: found by one walk, each with its key and its format, or counted as not read.

A key names a document by where it stands *within* its source (`src/cli.py`, `books.jsonl:00ac`), never by where the
source stands on this machine: the validation split hashes them, and must be the same everywhere and stay when sources
grow.
"""

import hashlib
import io
import os
import socket
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moray import UserError
from moray.data.reading.formats import KNOWN, Format, format_of
from moray.data.reading.records import Loss, Reason
from moray.data.reading.urls import entries, is_url, local_path, open_url

STDLIB = "stdlib"
# Test suites are most of the standard library's bytes and little of its prose; site-packages is not part of it.
STDLIB_LEAVES_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to be read, and what its documents' keys begin with.

    path: a str is an fsspec URL. version: changes when its content does; empty where nothing says so.
    """

    path: Path | str
    key: str
    format: Format
    size: int
    version: str

    def open(self) -> io.BufferedReader:
        return open_url(self.path) if isinstance(self.path, str) else open(self.path, "rb")

    def digest(self) -> str:
        """Of its content, which is read for it. Raises UserError where a storage does not answer."""
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]

    def check(self) -> None:
        """Raises UserError where this machine does not see the file that was found: it has changed, or is elsewhere."""
        if isinstance(self.path, str):
            return
        try:
            is_same = (self.size, self.version) == _stat(self.path)
        except OSError:
            is_same = False
        if not is_same:
            raise UserError(
                f"on {socket.gethostname()}: source {self.path} is not there as it was found; let it be while it is "
                "read and, with --engine ray, keep sources on storage that all nodes share, or at a URL"
            )


@dataclass(frozen=True)
class Source:
    """A source as it was given, what its keys begin with, the files to be read, and what of it is not."""

    given: str
    label: str
    files: tuple[SourceFile, ...]
    losses: tuple[Loss, ...] = ()


def find(sources: Sequence[str | Path]) -> list[Source]:
    """The sources in the order given: `stdlib`, a folder with all below it that has a known format, or a file; those
    two may be fsspec URLs.

    Hidden files and folders (.git, .cache) and links to folders are not read.
    Raises UserError for a source that does not exist, has no known format, or holds no file of one.
    """
    if not sources:
        raise UserError("no source to read; give `stdlib`, a folder or a file")
    seen: Counter[str] = Counter()
    found = []
    for given in sources:
        path = Path(given) if given == STDLIB else _resolve(given)
        name = path.rstrip("/").rpartition("/")[2] if isinstance(path, str) else path.name
        seen[name] += 1
        # The first of a name has it alone, so that its keys stay when others are added.
        label = name if seen[name] == 1 else f"{name}#{seen[name]}"
        found.append(_source(str(given), path, label))
    return found


def _resolve(source: str | Path) -> Path | str:
    """A path of this machine, or a URL of elsewhere."""
    path = local_path(str(source)) if is_url(source) else Path(source)
    if path is None:
        return str(source)
    path = path.expanduser().resolve()
    if not path.exists():
        raise UserError(f"source {str(source)!r} does not exist; give `stdlib`, a folder or a file")
    return path


def _source(given: str, path: Path | str, label: str) -> Source:
    if given == STDLIB:
        walked = _walk(Path(sysconfig.get_path("stdlib")), label, STDLIB_LEAVES_OUT)
        texts = (file for file in walked if isinstance(file, SourceFile) and file.format == Format("text"))
        return Source(given, label, tuple(texts))
    found = list(_found_at(path, label) if isinstance(path, str) else _found_in(path, label))
    if found == [Loss(Reason.UNREAD, str(path))]:
        raise UserError(f"source {given!r} has no known format; one of: {KNOWN}")
    files = tuple(file for file in found if isinstance(file, SourceFile))
    losses = tuple(loss for loss in found if isinstance(loss, Loss))
    if not files:
        instead = f"; found {', '.join(Path(loss.place).name for loss in losses[:5])}" if losses else ""
        raise UserError(f"source {given!r} holds no documents: no file of a known format ({KNOWN}){instead}")
    return Source(given, label, files, losses)


def _found_in(path: Path, label: str) -> Iterator[SourceFile | Loss]:
    if not path.is_file():
        yield from _walk(path, label)
    elif format := format_of(path.name):
        yield SourceFile(path, label, format, *_stat(path))
    else:
        yield Loss(Reason.UNREAD, str(path))


def _found_at(url: str, label: str) -> Iterator[SourceFile | Loss]:
    """As `_walk`: what is hidden is not read."""
    hidden = set()
    for entry in entries(url):
        parts = entry.within.split("/")
        first_hidden = next((n for n, part in enumerate(parts, 1) if part.startswith(".")), None)
        format = format_of(entry.url.rpartition("/")[2])
        if first_hidden is not None and first_hidden < len(parts):
            hidden.add(f"{url.rstrip('/')}/{'/'.join(parts[:first_hidden])}/")
        elif first_hidden is not None or format is None:
            yield Loss(Reason.UNREAD, entry.url if entry.within else url)
        else:
            key = f"{label}/{entry.within}" if entry.within else label
            yield SourceFile(entry.url, key, format, entry.size, entry.version)
    yield from (Loss(Reason.UNREAD, place) for place in sorted(hidden))


def _stat(path: Path) -> tuple[int, str]:
    stat = path.stat()
    return stat.st_size, str(stat.st_mtime_ns)


def _is_passed_over(name: str) -> bool:
    """Whether a folder is hidden, or what a preparation works in: `--out` may lie within a source."""
    return name.startswith(".") or name.endswith((".moray-unfinished", ".moray-replaced"))


def _walk(folder: Path, label: str, leave_out: frozenset[str] = frozenset()) -> Iterator[SourceFile | Loss]:
    """All below a folder, in an order that is always the same."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"source folder {error.filename} cannot be read ({error.strerror})") from None

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        for name in sorted(folders):
            if _is_passed_over(name) or Path(parent, name).is_symlink():
                yield Loss(Reason.UNREAD, f"{Path(parent, name)}/")
        folders[:] = sorted(name for name in folders if name not in leave_out and not _is_passed_over(name))
        for name in sorted(files):
            path = Path(parent, name)
            format = format_of(name)
            # A broken link, such as an editor's lock file, is no document.
            if format is None or name.startswith(".") or not path.is_file():
                yield Loss(Reason.UNREAD, str(path))
            else:
                yield SourceFile(path, f"{label}/{path.relative_to(folder).as_posix()}", format, *_stat(path))
