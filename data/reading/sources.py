"""Which files the sources are: found by one walk, each with its key and its format, or counted as not read.

A key names a document by where it stands *within* its source (`src/cli.py`, `books.jsonl:00ac`), never by where the
source stands on this machine: the validation split hashes them, and must be the same everywhere and stay when sources
grow.
"""

import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moray import UserError
from moray.data.reading.formats import KNOWN, Format, format_of
from moray.data.reading.records import Loss, Reason

STDLIB = "stdlib"
# Test suites are most of the standard library's bytes and little of its prose; site-packages is not part of it.
STDLIB_LEAVES_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to be read, and what its documents' keys begin with."""

    path: Path
    key: str
    format: Format


@dataclass(frozen=True)
class Source:
    """A source as it was given, what its keys begin with, the files to be read, and what of it is not."""

    given: str
    label: str
    files: tuple[SourceFile, ...]
    losses: tuple[Loss, ...] = ()


def find(sources: Sequence[str | Path]) -> list[Source]:
    """The sources in the order given: `stdlib`, a folder with all below it that has a known format, or a file.

    Hidden files and folders (.git, .cache) and links to folders are not read.
    Raises UserError for a source that does not exist, has no known format, or holds no file of one.
    """
    if not sources:
        raise UserError("no source to read; give `stdlib`, a folder or a file")
    seen: Counter[str] = Counter()
    found = []
    for given in sources:
        path = Path(given) if given == STDLIB else _resolve(given)
        seen[path.name] += 1
        # The first of a name has it alone, so that its keys stay when others are added.
        label = path.name if seen[path.name] == 1 else f"{path.name}#{seen[path.name]}"
        found.append(_source(str(given), path, label))
    return found


def _resolve(source: str | Path) -> Path:
    path = Path(source).expanduser().resolve()
    if not path.exists():
        raise UserError(f"source {str(source)!r} does not exist; give `stdlib`, a folder or a file")
    return path


def _source(given: str, path: Path, label: str) -> Source:
    if given == STDLIB:
        walked = _walk(Path(sysconfig.get_path("stdlib")), label, STDLIB_LEAVES_OUT)
        texts = (file for file in walked if isinstance(file, SourceFile) and file.format == Format("text"))
        return Source(given, label, tuple(texts))
    if path.is_file():
        if (format := format_of(path.name)) is None:
            raise UserError(f"source {given!r} has no known format; one of: {KNOWN}")
        return Source(given, label, (SourceFile(path, label, format),))
    found = list(_walk(path, label))
    files = tuple(file for file in found if isinstance(file, SourceFile))
    losses = tuple(loss for loss in found if isinstance(loss, Loss))
    if not files:
        instead = f"; found {', '.join(Path(loss.place).name for loss in losses[:5])}" if losses else ""
        raise UserError(f"source {given!r} holds no documents: no file of a known format ({KNOWN}){instead}")
    return Source(given, label, files, losses)


def _walk(folder: Path, label: str, leave_out: frozenset[str] = frozenset()) -> Iterator[SourceFile | Loss]:
    """All below a folder, in an order that is always the same."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"source folder {error.filename} cannot be read ({error.strerror})") from None

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        for name in sorted(folders):
            if name.startswith(".") or Path(parent, name).is_symlink():
                yield Loss(Reason.UNREAD, f"{Path(parent, name)}/")
        folders[:] = sorted(name for name in folders if name not in leave_out and not name.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            format = format_of(name)
            # A broken link, such as an editor's lock file, is no document.
            if format is None or name.startswith(".") or not path.is_file():
                yield Loss(Reason.UNREAD, str(path))
            else:
                yield SourceFile(path, f"{label}/{path.relative_to(folder).as_posix()}", format)
