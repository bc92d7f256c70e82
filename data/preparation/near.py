"""Near-duplicates: of all documents that share a MinHash band, the one with the smallest digest stays.

Whoever shares any bucket with a smaller digest is dropped, though that one may be dropped in another bucket itself.
So who stays is a function of the documents, no two that stay share a bucket, and nothing clusters all documents on one
machine; of a chain A ~ B ~ C, of which A and C are not alike, more stays than of connected components.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moray.data.preparation.runs import BAND, Run, slice_of
from moray.data.preparation.selection import Selection

BUCKET_BYTES = 64 << 20
DROPPED = np.dtype([("digest", "S16"), ("kept", "S16")])


@dataclass(frozen=True)
class FindNear:
    """One of `n_buckets` ranges of bands' hashes, over all runs -> `dropped.npy`: DROPPED, by digest; `winners.npy`:
    the digests of those for whose sake they are dropped, sorted.
    """

    out: Path
    runs: tuple[Run, ...]
    selection: Selection
    bucket: int
    n_buckets: int
    size: int = 1

    def run(self, folder: Path) -> dict[str, Any]:
        bands = np.concatenate([run.bands(self.bucket, self.n_buckets) for run in self.runs])
        found = dropped(bands[self.selection.keeps(bands["score"], bands["digest"])])
        np.save(folder / "dropped.npy", found)
        np.save(folder / "winners.npy", np.unique(found["kept"]))
        return {}


def dropped(bands: np.ndarray) -> np.ndarray:
    """Who is dropped and, of those for whose sake, the smallest: BAND [bands] -> DROPPED, each digest once, sorted."""
    assert bands.dtype == BAND
    ordered = bands[np.lexsort((bands["digest"], bands["hash"]))]
    begins = np.concatenate([[True], ordered["hash"][1:] != ordered["hash"][:-1]])[: len(ordered)]
    winners = ordered["digest"][np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    lost = winners != ordered["digest"]
    found = np.empty(int(lost.sum()), DROPPED)
    found["digest"], found["kept"] = ordered["digest"][lost], winners[lost]
    return _first_of_each(found)


def dropped_in(folders: Sequence[Path], bucket: int, n_buckets: int) -> np.ndarray:
    """What those ranges of hashes found of a bucket of digests: DROPPED, each digest once, sorted."""
    parts = [np.zeros(0, DROPPED)]
    for folder in folders:
        found = np.load(folder / "dropped.npy", mmap_mode="r")
        parts.append(np.array(found[slice_of(found["digest"], bucket, n_buckets)]))
    return _first_of_each(np.concatenate(parts))


def winners_in(folders: Sequence[Path], bucket: int, n_buckets: int) -> np.ndarray:
    """Those of a bucket of digests for whose sake others are dropped, in this bucket or another one: sorted digests."""
    parts = [np.zeros(0, "S16")]
    for folder in folders:
        found = np.load(folder / "winners.npy", mmap_mode="r")
        parts.append(np.array(found[slice_of(found, bucket, n_buckets)]))
    return np.unique(np.concatenate(parts))


def _first_of_each(found: np.ndarray) -> np.ndarray:
    found = found[np.lexsort((found["kept"], found["digest"]))]
    return found[np.concatenate([[True], found["digest"][1:] != found["digest"][:-1]])[: len(found)]]
