"""Turns sources (files, folders, the standard library) into a stream of documents with keys that stay put.

A key names a document by where it stands *within* its source (`src/cli.py`, `books.jsonl:00ac`), never by where the
source stands on this machine: the validation split hashes keys, and must be the same everywhere and stay when sources
grow. A row's own `id` names it if it has one; that ids differ is the file's part of the bargain.
"""

import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moray import UserError
from moray.data.formats import TEXT_SUFFIXES, Raw, is_readable, read_file

STDLIB = "stdlib"
# Test suites are most of the standard library's bytes and little of its prose; site-packages is not part of it.
STDLIB_LEAVES_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
NAMES_KEPT = 10


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the key that names it."""

    key: str
    text: str


@dataclass
class Skipped:
    """What reading left out: how many for each reason, and the names of the first few (memory stays bounded)."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def note(self, reason: str, key: str) -> None:
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < NAMES_KEPT:
            names.append(key)


def read_documents(sources: Sequence[str | Path], skipped: Skipped | None = None) -> Iterator[Document]:
    """The documents of all sources, in a stable order, one in memory at a time.

    A source is `stdlib`, a folder (.py .md .rst .txt below it; hidden folders are left out), a file of one of those
    kinds, .jsonl (field `text`; also .gz, .zst), .parquet (column `text`), or a WebDataset .tar (txt or json members).
    What is empty or not UTF-8 is left out and noted in `skipped`.
    Raises UserError, before anything is read, for a source that does not exist or has no known format; and while
    reading, naming file and place, for one that is damaged or holds no document.
    """
    if not sources:
        raise UserError("no source to read; give `stdlib`, a folder or a file")
    resolved = [STDLIB if source == STDLIB else _resolve(source) for source in sources]
    skipped = Skipped() if skipped is None else skipped
    return (
        document
        for source, label in zip(resolved, _labels(resolved), strict=True)
        for document in _documents(source, label, skipped)
    )


def _resolve(source: str | Path) -> Path:
    path = Path(source).expanduser().resolve()
    if not path.exists():
        raise UserError(f"source {str(source)!r} does not exist; give `stdlib`, a folder or a file")
    if path.is_file() and not is_readable(path):
        kinds = " ".join((*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".tar"))
        raise UserError(f"source {str(source)!r} has no known format; one of: {kinds}")
    return path


def _labels(sources: Sequence[str | Path]) -> list[str]:
    """A short unique name for each source: its file name, numbered from the second of that name on."""
    seen: Counter[str] = Counter()
    labels = []
    for source in sources:
        name = Path(source).name
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return labels


def _documents(source: str | Path, label: str, skipped: Skipped) -> Iterator[Document]:
    found = False
    for key, raw in _raw(source, label):
        found = True
        text = _decode(raw)
        if text is None:
            skipped.note("not UTF-8", key)
        elif not text.strip():
            skipped.note("empty", key)
        else:
            yield Document(key, text)
    if not found:
        raise UserError(f"source {str(source)!r} holds no documents")


def _raw(source: str | Path, label: str) -> Iterator[Raw]:
    if source != STDLIB and Path(source).is_file():
        for name, raw in read_file(Path(source)):
            yield (f"{label}:{name}" if name else label), raw
        return
    folder = Path(sysconfig.get_path("stdlib")) if source == STDLIB else Path(source)
    for path in _text_files(folder, STDLIB_LEAVES_OUT if source == STDLIB else frozenset()):
        for _, raw in read_file(path):
            yield f"{label}/{path.relative_to(folder).as_posix()}", raw


def _text_files(folder: Path, leave_out: frozenset[str]) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in leave_out and not name.startswith("."))
        paths = (Path(parent, name) for name in sorted(files))
        # A broken link, such as an editor's lock file, is no document.
        yield from (path for path in paths if path.suffix.lower() in TEXT_SUFFIXES and path.is_file())


def _decode(raw: str | bytes) -> str | None:
    """The text, or None where it has no UTF-8 form (bad bytes, or the lone surrogates that JSON escapes can hide)."""
    try:
        if isinstance(raw, bytes):
            return raw.decode("utf-8")
        raw.encode("utf-8")
        return raw
    except UnicodeError:
        return None
