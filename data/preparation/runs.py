"""Documents on their way through the shuffle: runs sorted by digest, of which any bucket is a slice.

    run-000.documents    key and text of each document, one after another, in the order of their digests
    run-000.index.npy    INDEX, a record a document
    run-000.bands.npy    BAND, a record a band of a document, by hash; where near-duplicates are looked for

A digest is 16 bytes of the text's hash, keyed by the seed: uniform, so that sorted order *is* a shuffle, and equal
texts are neighbours. Which documents share a run is a matter of memory and shows in nothing else.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from moray.data.preparation.ledger import SAMPLES
from moray.data.reading.documents import Document

RUN_BYTES = 64 << 20
RECORD_BYTES = 300  # what a small document takes in memory beside its text
MAX_BUCKETS = 1 << 16
MOST_COPIES = 1 + SAMPLES  # the one that stays, and those that a report may show

INDEX = np.dtype(
    [
        ("digest", "S16"),
        ("side", "<u8"),
        ("offset", "<u8"),
        ("text_bytes", "<u8"),
        ("key_bytes", "<u4"),
        ("score", "<u2"),
        ("more", "<u4"),
    ]
)
BAND = np.dtype([("hash", "<u8"), ("digest", "S16"), ("score", "<u2")])
"""side: 64 bits of key and text, not keyed by the seed, which decide about the validation split. more: copies of the
text that came with this one and are only counted.
"""


@dataclass(frozen=True, slots=True)
class Record:
    """A document in a run. score: the quality classifier's, 0 to 65,535, if there is one."""

    digest: bytes
    side: int
    key: bytes
    text: bytes
    source: int = 0
    score: int = 0
    bands: np.ndarray | None = None  # uint64: hashes of its MinHash bands, if it has any


def record_of(document: Document, seed: int, score: int = 0, bands: np.ndarray | None = None) -> Record:
    key, text = document.key.encode("utf-8", "replace"), document.text.encode()
    if document.group is None:
        # Of the text too: files may give one id to all their documents, which a hash of keys could not split.
        side = hashlib.blake2b(text, digest_size=8, key=hashlib.blake2b(key).digest()).digest()
    else:
        side = hashlib.blake2b(document.group.encode(), digest_size=8).digest()
    digest = digest_of(document.text, seed)
    return Record(digest, int.from_bytes(side, "little"), key, text, score=score, bands=bands)


def digest_of(text: str, seed: int) -> bytes:
    """A document's place in the shuffle."""
    return hashlib.blake2b(text.encode(), digest_size=16, key=(seed % (1 << 64)).to_bytes(8, "little")).digest()


class RunWriter:
    """Gathers records and writes them as runs of at most `run_bytes`. Memory: one run.

    counts_copies: of a text that comes more than MOST_COPIES times in a run, only those that may stay or be shown are
    written, the first by side and key; so a bucket is no larger where one text comes a million times.
    """

    def __init__(self, folder: Path, run_bytes: int, *, has_bands: bool = False, counts_copies: bool = False) -> None:
        self._folder, self._run_bytes, self._has_bands = folder, run_bytes, has_bands
        self._counts_copies = counts_copies
        self._records: list[Record] = []
        self._held = 0
        self.n_runs = self.n_documents = self.n_bytes = self.n_bands = 0

    def add(self, record: Record) -> None:
        self._records.append(record)
        self._held += len(record.text) + len(record.key) + RECORD_BYTES
        if record.bands is not None:
            self._held += record.bands.nbytes + BAND.itemsize * len(record.bands)
            self.n_bands += len(record.bands)
        self.n_documents += 1
        self.n_bytes += len(record.text)
        if self._held >= self._run_bytes:
            self.flush()

    def flush(self) -> None:
        if not self._records:
            return
        self._records.sort(key=lambda record: (record.digest, record.side, record.key))
        more = self._count_copies() if self._counts_copies else [0] * len(self._records)
        index = np.empty(len(self._records), INDEX)
        offset, path = 0, self._folder / f"run-{self.n_runs:03d}.documents"
        with open(path, "wb") as file:
            for number, record in enumerate(self._records):
                sizes = len(record.text), len(record.key)
                index[number] = (record.digest, record.side, offset, *sizes, record.score, more[number])
                file.write(record.key)
                file.write(record.text)
                offset += sum(sizes)
        np.save(path.with_suffix(".index.npy"), index)
        if self._has_bands:
            np.save(path.with_suffix(".bands.npy"), _bands_of(self._records))
        self._records, self._held = [], 0
        self.n_runs += 1

    def _count_copies(self) -> list[int]:
        """Leaves MOST_COPIES of each text, and tells how many more there were, at its first one."""
        records, more = [], []
        for _, each in groupby(self._records, key=lambda record: record.digest):
            copies = list(each)
            records += copies[:MOST_COPIES]
            more += [max(len(copies) - MOST_COPIES, 0), *([0] * (min(len(copies), MOST_COPIES) - 1))]
        self._records = records
        return more


def _bands_of(records: Sequence[Record]) -> np.ndarray:
    bands = [np.zeros(0, np.uint64) if record.bands is None else record.bands for record in records]
    counts = [len(each) for each in bands]
    found = np.empty(sum(counts), BAND)
    found["hash"] = np.concatenate(bands)
    found["digest"] = np.repeat(np.array([record.digest for record in records], "S16"), counts)
    found["score"] = np.repeat(np.array([record.score for record in records], np.uint16), counts)
    return found[np.argsort(found["hash"], kind="stable")]


def whole(digest: bytes) -> bytes:
    """numpy's strings end before the zeros at their end."""
    return bytes(digest).ljust(16, b"\0")


@dataclass(frozen=True)
class Run:
    """A run, by its documents' file. source: its number, which is another one where sources are in another order."""

    path: Path
    source: int = 0

    def index(self, bucket: int, n_buckets: int) -> np.ndarray:
        """The records, INDEX, of one of equally many buckets, a power of two."""
        index = np.load(self.path.with_suffix(".index.npy"), mmap_mode="r")
        return np.array(index[slice_of(index["digest"], bucket, n_buckets)])

    def bands(self, bucket: int, n_buckets: int) -> np.ndarray:
        """The records, BAND, whose hashes are in one of equally many ranges, a power of two."""
        bands = np.load(self.path.with_suffix(".bands.npy"), mmap_mode="r")
        step = (1 << 64) // n_buckets
        # numpy's search would copy all of a column that is not aligned, and so read the whole file.
        low, high = (
            len(bands) if n == n_buckets else bisect_left(bands["hash"], np.uint64(n * step))
            for n in (bucket, bucket + 1)
        )
        return np.array(bands[low:high])


def runs_in(folder: Path, source: int = 0) -> tuple[Run, ...]:
    return tuple(Run(path, source) for path in sorted(folder.glob("run-*.documents")))


def slice_of(digests: np.ndarray, bucket: int, n_buckets: int) -> slice:
    """Where a bucket lies among sorted digests: those whose first two bytes, as a number, fall into it."""
    step = MAX_BUCKETS // n_buckets

    def begin(number: int) -> int:
        if number == n_buckets:
            return len(digests)
        return int(np.searchsorted(digests, (number * step).to_bytes(2, "big"))) if number else 0

    return slice(begin(bucket), begin(bucket + 1))


def buckets_for(n_bytes: int, bucket_bytes: int) -> int:
    """How many buckets hold so many bytes, if none is to hold more than about `bucket_bytes`: a power of two."""
    return min(1 << max(-(-n_bytes // bucket_bytes) - 1, 0).bit_length(), MAX_BUCKETS)


def read_records(rows: np.ndarray, runs: Sequence[Run]) -> Iterator[tuple[bytes, bytes]]:
    """Key and text of each of some documents of a bucket, rows of INDEX with their `run`. Memory: the bucket."""
    blobs: dict[int, tuple[int, bytes]] = {}
    for number in np.unique(rows["run"]).tolist():
        of_run = rows[rows["run"] == number]
        begin = int(of_run["offset"].min())
        end = int((of_run["offset"] + of_run["text_bytes"] + of_run["key_bytes"]).max())
        with open(runs[number].path, "rb") as file:
            file.seek(begin)
            blobs[number] = begin, file.read(end - begin)
    fields = ("run", "offset", "key_bytes", "text_bytes")
    for number, offset, n_key, n_text in zip(*(rows[name].tolist() for name in fields), strict=True):
        begin, blob = blobs[number]
        start = offset - begin
        yield blob[start : start + n_key], blob[start + n_key : start + n_key + n_text]
