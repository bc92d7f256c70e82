"""Shuffles and deduplicates a corpus of any size on disk: one keyed hash of the text does both.

Documents are scattered into buckets by hash(seed, text) and each bucket is sorted by it. The hash being uniform, sorted
order *is* a shuffle; equal texts meet as neighbours, of which all but one are dropped, or none. The result depends on
the set of documents and the seed alone, never on the order they were read in. Memory: one bucket (64 MiB of text, or
the largest document); disk: the text once, and one bucket more.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from moray import UserError
from moray.data.reading.documents import Document

BUCKET_BYTES = 64 << 20
MAX_DEPTH = 4  # 256^4 buckets of 64 MiB; deeper than that only equal texts can keep a bucket large

_HEADER = struct.Struct("<16sQQQ")  # digest of the text, side of the split, bytes of the key, bytes of the text


@dataclass(frozen=True, slots=True)
class Record:
    """A document on its way through the shuffle."""

    digest: bytes  # 16 bytes, keyed by the seed: the document's place in the shuffle
    side: int  # 64 bits of key and text, not keyed by the seed: which side of the validation split
    key: bytes
    text: bytes


@dataclass(frozen=True)
class ShuffledCorpus:
    """The documents in shuffled order, on disk; may be read any number of times."""

    files: tuple[Path, ...]
    n_documents: int
    n_duplicates: int
    n_bytes: int
    sides: tuple[int, int]  # the lowest and the highest

    def validation_limit(self, fraction: float) -> int:
        """Documents whose `side` is below this are for validation: `fraction` of them, but at least one on each side.

        Raises UserError if there are no two documents to tell apart.
        """
        low, high = self.sides
        if low >= high:
            raise UserError(
                f"the sources hold only {self.n_documents} distinct document, and a validation split needs at least 2; "
                "give more, for example a .jsonl with one text a line"
            )
        return min(max(int(fraction * (1 << 64)), low + 1), high)

    def __iter__(self) -> Iterator[Record]:
        for path in self.files:
            yield from _read(path)


def scatter(documents: Iterable[Document], folder: Path, seed: int) -> None:
    """Writes every document into its bucket, a file of `folder` (which is created)."""
    salt = (seed % (1 << 64)).to_bytes(8, "little")
    _scatter((_record(document, salt) for document in documents), folder, depth=0)


def _record(document: Document, salt: bytes) -> Record:
    key, text = document.key.encode("utf-8", "replace"), document.text.encode()
    digest = hashlib.blake2b(text, digest_size=16, key=salt).digest()
    if document.group is None:
        # Of the text too: files may give one id to all their documents, which a hash of keys could not split.
        side = hashlib.blake2b(text, digest_size=8, key=hashlib.blake2b(key).digest()).digest()
    else:
        side = hashlib.blake2b(document.group.encode(), digest_size=8).digest()
    return Record(digest, int.from_bytes(side, "little"), key, text)


def sort(folder: Path, *, keep_equal: bool = False) -> Iterator[ShuffledCorpus]:
    """Sorts the buckets one after another, yielding what is done so far: the last one yielded is the whole.

    keep_equal: equal texts all stay, and those of one key are told apart by `#2` and so on.
    """
    done = ShuffledCorpus((), 0, 0, 0, ((1 << 64) - 1, 0))
    for path in _leaves(folder, depth=0):
        n_read, records = _all(path) if keep_equal else _distinct(path)
        with open(path, "wb") as file:
            for record in records:
                _write(file, record)
        low, high = done.sides
        done = ShuffledCorpus(
            (*done.files, path),
            done.n_documents + len(records),
            done.n_duplicates + n_read - len(records),
            done.n_bytes + sum(len(record.text) for record in records),
            (min(low, *(record.side for record in records)), max(high, *(record.side for record in records))),
        )
        yield done


def _distinct(path: Path) -> tuple[int, list[Record]]:
    """How many records a bucket has, and those of different texts, sorted."""
    distinct: dict[bytes, Record] = {}
    n_read = 0
    for record in _read(path):
        n_read += 1
        kept = distinct.setdefault(record.digest, record)
        # Which copy stays must not depend on reading order, or the split would.
        if (record.side, record.key) < (kept.side, kept.key):
            distinct[record.digest] = record
    return n_read, [distinct[digest] for digest in sorted(distinct)]


def _all(path: Path) -> tuple[int, list[Record]]:
    records = sorted(_read(path), key=lambda record: (record.digest, record.key))
    named = []
    for _, same in groupby(records, lambda record: (record.digest, record.key)):
        first, *others = same
        named.append(first)
        named += [replace(other, key=b"%s#%d" % (other.key, n)) for n, other in enumerate(others, 2)]
    return len(records), named


def _leaves(folder: Path, depth: int) -> Iterator[Path]:
    """The bucket files in order of digest, after splitting those that are too large for memory."""
    for path in sorted(folder.iterdir()):
        if path.stat().st_size <= BUCKET_BYTES or depth + 1 == MAX_DEPTH:
            yield path
        else:
            finer = path.with_suffix(".split")
            _scatter(_read(path), finer, depth + 1)
            path.unlink()
            yield from _leaves(finer, depth + 1)


def _scatter(records: Iterable[Record], folder: Path, depth: int) -> None:
    folder.mkdir()
    buckets: dict[int, BinaryIO] = {}
    try:
        for record in records:
            number = record.digest[depth]
            if number not in buckets:
                buckets[number] = open(folder / f"{number:02x}", "wb")  # noqa: SIM115
            _write(buckets[number], record)
    finally:
        for file in buckets.values():
            file.close()


def _write(file: BinaryIO, record: Record) -> None:
    file.write(_HEADER.pack(record.digest, record.side, len(record.key), len(record.text)))
    file.write(record.key)
    file.write(record.text)


def _read(path: Path) -> Iterator[Record]:
    with open(path, "rb") as file:
        while header := file.read(_HEADER.size):
            digest, side, n_key, n_text = _HEADER.unpack(header)
            yield Record(digest, side, file.read(n_key), file.read(n_text))
