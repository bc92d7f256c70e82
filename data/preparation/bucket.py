"""One bucket of the shuffle: what of it stays, in which order. Equal texts are neighbours; near ones are known."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moray.data.preparation.drops import ledger_of, save_names
from moray.data.preparation.ledger import SAMPLES, Ledger, Sample, excerpt
from moray.data.preparation.near import dropped_in, winners_in
from moray.data.preparation.runs import INDEX, Record, Run, read_records, whole
from moray.data.preparation.selection import Selection

BUCKET_BYTES = 64 << 20
ORDER = np.dtype([*INDEX.descr, ("run", "<u4"), ("source", "<u4"), ("copy", "<u4")])
"""run: in which the document lies. source: its number. copy: how often its key and text have come before it, in its
bucket.
"""


@dataclass(frozen=True)
class SortBucket:
    """Bucket `bucket` of `n_buckets`, over all runs -> `order.npy`: ORDER, what stays, in its order.

    near: the folders of what `FindNear` found. keep_equal: equal texts all stay. keep_drops: what is
    dropped is listed, and the keys of those for whose sake near-duplicates are dropped, here or in other buckets.
    """

    out: Path
    runs: tuple[Run, ...]
    labels: tuple[str, ...]
    near: tuple[Path, ...]
    selection: Selection
    keep_equal: bool
    bucket: int
    n_buckets: int
    keep_drops: bool
    size: int = 1

    def run(self, folder: Path) -> dict[str, Any]:
        with ledger_of(folder, self.keep_drops) as ledger:
            rows = self._kept(ledger, folder)
        np.save(folder / "order.npy", rows)
        sides = rows["side"]
        return {
            "ledger": ledger.as_json(),
            "n_documents": len(rows),
            "n_bytes": int(rows["text_bytes"].sum()),
            "sides": [int(sides.min()), int(sides.max())] if len(rows) else [],
        }

    def _kept(self, ledger: Ledger, folder: Path) -> np.ndarray:
        rows = self._rows()
        good = self.selection.keeps(rows["score"], rows["digest"])
        self._drop(ledger, rows[~good], "quality", "score", [f"{score}" for score in rows["score"][~good].tolist()])
        rows = rows[good]
        rows = self._numbered(rows) if self.keep_equal else self._distinct(rows, ledger)
        near = dropped_in(self.near, self.bucket, self.n_buckets)
        where = np.minimum(np.searchsorted(near["digest"], rows["digest"]), max(len(near) - 1, 0))
        lost = near["digest"][where] == rows["digest"] if len(near) else np.zeros(len(rows), bool)
        winners = [whole(digest).hex() for digest in near["kept"][where[lost]].tolist()] if len(near) else []
        self._drop(ledger, rows[lost], "near-duplicates", "MinHash", [""] * len(winners), winners)
        if self.keep_drops:
            known = rows[np.isin(rows["digest"], winners_in(self.near, self.bucket, self.n_buckets))]
            save_names(folder, known, [key for key, _ in read_records(known, self.runs)])
        return rows[~lost]

    def _rows(self) -> np.ndarray:
        parts = []
        for number, run in enumerate(self.runs):
            found = run.index(self.bucket, self.n_buckets)
            part = np.zeros(len(found), ORDER)
            for name in INDEX.names or ():
                part[name] = found[name]
            part["run"], part["source"] = number, run.source
            parts.append(part)
        rows = np.concatenate(parts)
        return rows[np.lexsort((rows["side"], rows["digest"]))]

    def _distinct(self, rows: np.ndarray, ledger: Ledger) -> np.ndarray:
        """Of each text the copy with the smallest side, then key: reading order must not matter, or the split would."""
        begins = _begins(rows["digest"])
        if begins.all():
            return rows
        alike = ~begins | np.concatenate([~begins[1:], [False]])
        copies = rows[alike]
        keys = [key for key, _ in read_records(copies, self.runs)]
        by_key = sorted(range(len(copies)), key=lambda n: (copies["digest"][n], int(copies["side"][n]), keys[n]))
        copies, keys = copies[by_key], [keys[n] for n in by_key]
        first = _begins(copies["digest"])
        kept = [keys[n].decode() for n in np.flatnonzero(first)[np.cumsum(first) - 1].tolist()]
        winners = [name for name, is_first in zip(kept, first, strict=True) if not is_first]
        self._drop(ledger, copies[~first], "exact duplicates", "equal text", [""] * len(winners), winners)
        # What the one that stays stands for is dropped as well.
        self._count(ledger, copies[first], copies["more"][first], "exact duplicates", "equal text")
        copies["more"] = 0
        rows = rows.copy()
        rows[alike] = copies
        return rows[begins]

    def _numbered(self, rows: np.ndarray) -> np.ndarray:
        begins = _begins(rows["digest"])
        alike = ~begins | np.concatenate([~begins[1:], [False]])[: len(rows)]
        copies = rows[alike]
        keys = [key for key, _ in read_records(copies, self.runs)]
        by_key = sorted(range(len(copies)), key=lambda n: (copies["digest"][n], keys[n]))
        before: tuple[bytes, bytes, int] | None = None
        for n in by_key:
            this = copies["digest"][n], keys[n]
            number = before[2] + 1 if before and before[:2] == this else 0
            before = (*this, number)
            copies["copy"][n] = number
        rows = rows.copy()
        rows[alike] = copies[by_key]
        return rows

    def _drop(
        self,
        ledger: Ledger,
        rows: np.ndarray,
        stage: str,
        reason: str,
        values: list[str],
        kept: list[str] | None = None,
    ) -> None:
        self._count(ledger, rows, 1 + rows["more"].astype(np.int64), stage, reason)
        told = np.lexsort((rows["side"], rows["digest"]))[: None if ledger.tell else SAMPLES]
        samples: list[Sample] = []
        for n, (key, text) in zip(told.tolist(), read_records(rows[told], self.runs), strict=True):
            digest, winner = whole(rows["digest"][n]).hex(), kept[n] if kept else ""
            sample = Sample(digest, key.decode(), values[n], excerpt(text.decode()), winner)
            if len(samples) < SAMPLES:
                samples.append(sample)
            if ledger.tell:
                label = self.labels[int(rows["source"][n])]
                ledger.tell(label, stage, reason, int(rows["text_bytes"][n]), sample)
        if samples:
            ledger.show(stage, reason, samples)

    def _count(self, ledger: Ledger, rows: np.ndarray, times: np.ndarray, stage: str, reason: str) -> None:
        """Each of the rows is dropped so many times."""
        n_bytes = rows["text_bytes"].astype(np.int64) * times
        for source in np.unique(rows["source"][times > 0]).tolist():
            here = rows["source"] == source
            ledger.count(self.labels[source], stage, reason, int(n_bytes[here].sum()), int(times[here].sum()))


def read_bucket(order: np.ndarray, runs: tuple[Run, ...]) -> Iterator[Record]:
    """The documents of some rows of a bucket, in their order. Memory: their text."""
    for row, (key, text) in zip(order, read_records(order, runs), strict=True):
        copy = int(row["copy"])
        name = key + b"#%d" % (copy + 1) if copy else key
        yield Record(whole(row["digest"]), int(row["side"]), name, text, int(row["source"]), int(row["score"]))


def _begins(digests: np.ndarray) -> np.ndarray:
    """Whether each of sorted digests is the first of its like."""
    return np.concatenate([[True], digests[1:] != digests[:-1]])[: len(digests)]
