"""Paragraphs that have stood before: each stays where it comes first in the order of the shuffle, and nowhere else.

Three stages, as memory is bounded: buckets tell the hashes of their paragraphs; each range of hashes goes through those
of all buckets, in their order, with a Bloom filter of its own; buckets are written anew without what was there before.
Of a new paragraph one in a million is taken for an old one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moray.data.curation.bloom import Bloom
from moray.data.curation.paragraphs import hashes, without
from moray.data.preparation.batches import batches
from moray.data.preparation.bucket import read_bucket
from moray.data.preparation.drops import ledger_of
from moray.data.preparation.ledger import Ledger, Sample, excerpt
from moray.data.preparation.runs import Record, Run

RATE = 1e-6
FILTER_HASHES = 1 << 23  # of one filter, which takes 32 MiB


@dataclass(frozen=True)
class HashParagraphs:
    """A bucket -> `hashes.npy`: uint64, of its paragraphs, sorted, so that a range of them is a slice; `places.npy`:
    uint32, where in the bucket each stands.
    """

    out: Path
    bucket: Path
    runs: tuple[Run, ...]
    size: int = 1

    def run(self, folder: Path) -> dict[str, Any]:
        parts = [np.zeros(0, np.uint64)]
        for batch in batches(read_bucket(np.load(self.bucket / "order.npy"), self.runs), _size):
            parts.append(hashes([record.text.decode() for record in batch])[0])
        found = np.concatenate(parts)
        places = np.argsort(found, kind="stable")
        np.save(folder / "hashes.npy", found[places])
        np.save(folder / "places.npy", places.astype(np.uint32))
        return {"n_paragraphs": len(found)}


@dataclass(frozen=True)
class FindRepeats:
    """One of `n_ranges` ranges of hashes, over all buckets -> `repeated.npy`: bool, whether each was there before."""

    out: Path
    hashed: tuple[Path, ...]
    number: int
    n_ranges: int
    size: int = 1

    def run(self, folder: Path) -> dict[str, Any]:
        ranges = [_in_range(hashed, self.number, self.n_ranges) for hashed in self.hashed]
        counts = [here.stop - here.start for here in ranges]
        bloom = Bloom.sized(sum(counts), RATE)
        repeated = [np.zeros(0, bool)]
        for hashed, here in zip(self.hashed, ranges, strict=True):
            in_order = np.argsort(_part(hashed / "places.npy", here))
            repeated.append(bloom.add(_part(hashed / "hashes.npy", here)[in_order]))
        np.save(folder / "repeated.npy", np.concatenate(repeated))
        np.save(folder / "ends.npy", np.cumsum(counts))
        return {}


@dataclass(frozen=True)
class CutRepeats:
    """A bucket without repeated paragraphs -> its `order.npy`, and the documents that changed as a run of their own.

    number: of the bucket. run_number: of that run. repeats: the folders of all ranges. keep_drops: what is
    dropped is listed.
    """

    out: Path
    bucket: Path
    runs: tuple[Run, ...]
    labels: tuple[str, ...]
    hashed: Path
    repeats: tuple[Path, ...]
    number: int
    run_number: int
    keep_drops: bool
    size: int = 1

    def run(self, folder: Path) -> dict[str, Any]:
        order, repeated = np.load(self.bucket / "order.npy"), self._repeated()
        stays, at, offset, n = np.ones(len(order), bool), 0, 0, 0
        with ledger_of(folder, self.keep_drops) as ledger, open(folder / "run-000.documents", "wb") as file:
            for batch in batches(read_bucket(order, self.runs), _size):
                texts = [record.text.decode() for record in batch]
                _, first, spans = hashes(texts)
                for number, record in enumerate(batch):
                    here = slice(*first[number : number + 2].tolist())
                    mine = repeated[at + here.start : at + here.stop]
                    if mine.any():
                        text = without(texts[number], spans[here], mine).encode()
                        stays[n] = bool(text)
                        if text:
                            ledger.clean(self.labels[record.source], "paragraphs", len(record.text) - len(text))
                            key_bytes = int(order["key_bytes"][n])
                            order["run"][n], order["offset"][n] = self.run_number, offset
                            order["text_bytes"][n] = len(text)
                            offset += file.write(record.key[:key_bytes]) + file.write(text)
                        else:
                            self._drop(ledger, record)
                    n += 1
                at += int(first[-1])
        order = order[stays]
        np.save(folder / "order.npy", order)
        sides = order["side"]
        return {
            "ledger": ledger.as_json(),
            "n_documents": len(order),
            "sides": [int(sides.min()), int(sides.max())] if len(order) else [],
        }

    def _drop(self, ledger: Ledger, record: Record) -> None:
        sample = Sample(record.digest.hex(), record.key.decode(), "", excerpt(record.text.decode()))
        ledger.drop(self.labels[record.source], "paragraphs", "nothing else", len(record.text), sample)

    def _repeated(self) -> np.ndarray:
        """Of each paragraph of the bucket, in its order."""
        repeated = np.zeros(len(np.load(self.hashed / "hashes.npy", mmap_mode="r")), bool)
        for number, folder in enumerate(self.repeats):
            ends = np.load(folder / "ends.npy")
            begin, end = (int(ends[n]) if n >= 0 else 0 for n in (self.number - 1, self.number))
            flags = np.load(folder / "repeated.npy", mmap_mode="r")[begin:end]
            here = _in_range(self.hashed, number, len(self.repeats))
            repeated[np.sort(_part(self.hashed / "places.npy", here))] = flags
        return repeated


def _in_range(hashed: Path, number: int, n_ranges: int) -> slice:
    """Where among a bucket's hashes those of one of equally many ranges are, a power of two."""
    found = np.load(hashed / "hashes.npy", mmap_mode="r")
    step = (1 << 64) // n_ranges
    begin = np.searchsorted(found, np.uint64(number * step), "left")
    end = np.searchsorted(found, np.uint64((number + 1) * step - 1), "right")
    return slice(int(begin), int(end))


def _part(array: Path, here: slice) -> np.ndarray:
    return np.array(np.load(array, mmap_mode="r")[here])


def _size(record: Record) -> int:
    return len(record.text)
