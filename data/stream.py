"""What a rank iterates: global batches, pure functions of (datasets, seed, batch number), prefetched by a thread.

Law 2: global batch n holds positions [nB, (n+1)B), which `data/mixture.py` deals out to the sources; each gives its
sequences in its own order (`data/order.py`), across epoch ends. A rank reads the lanes it owns. Joined over the ranks,
the lanes are the same for every world size and after every restart: the data state of a run is one integer.
"""

# Shapes: B lanes of this rank, T tokens of a sequence (seq_len).

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from moray import UserError
from moray.data.blocks import CACHE_BYTES
from moray.data.dataset import Dataset
from moray.data.mixture import CYCLE, Mixture, Phase
from moray.data.order import Order
from moray.data.rows import LongDialogues, Rows, rows_of

AT_ONCE = 64
"""Batches whose places are found together, where an epoch has so many: alone, one's would take longer than its rows."""


@dataclass(frozen=True)
class Batch:
    """This rank's lanes of global batch `step`; all tensors are int64 [B, T], of pairs [B, 2, T]: chosen and rejected.

    A document's first token is never a target: documents do not predict each other. Every other token of a split is a
    target exactly once an epoch; of dialogues, those of answers and their ends.
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor  # the next token; -100 where there is nothing to predict
    positions_BT: torch.Tensor  # within the document, or within the part of it that the row holds
    documents_BT: torch.Tensor  # which document of the row: 0, 1, 2, ...; padding is -1
    first: int  # stream position of lane 0 of the *global* batch
    step: int


@dataclass(frozen=True)
class Found:
    """The sequence at a position: which of the datasets gives it, in which of that one's epochs, where it lies there
    and what it holds.

    number: among the sequences of its shard, as spans are ranges of the shard's tokens. row: as `Rows.rows`, [4, T].
    """

    source: int
    epoch: int
    shard: int
    number: int
    spans: list[tuple[int, int]]
    row: np.ndarray


class Source:
    """The sequences of one dataset's split, in its order, epoch after epoch."""

    def __init__(
        self, dataset: Dataset, split: str, seq_len: int, seed: int, cache_bytes: int, long_dialogues: LongDialogues
    ) -> None:
        self.rows = rows_of(dataset, split, seq_len, cache_bytes, long_dialogues)
        self.order = Order(self.rows.counts, seed)

    def find(self, source: int, index: int) -> Found:
        """The sequence of that index; `source` is this one's own number."""
        places = self.order.locate(np.array([index]))
        (epoch,), (shard,), (number,) = (x.tolist() for x in (places.epochs, places.shards, places.sequences))
        row = self.rows.rows(places.shards, places.sequences)[:, 0]
        return Found(source, epoch, shard, number, self.rows.spans(shard, number), row)


class Stream:
    """An endless stream of training batches over one split of a dataset, or of several that a mixture mixes.

    Memory: `prefetch` batches, and of each dataset a cache of blocks, 256 MiB by default: what a window of its order
    takes; from a smaller one, blocks would be read again for every row. The first read of a block verifies it.
    Raises UserError for an unknown split, a sequence or batch without a token, or lanes outside the global batch;
    while reading, for a damaged shard.
    """

    def __init__(
        self,
        datasets: Dataset | Sequence[Dataset],
        split: str,
        *,
        seq_len: int,
        global_batch: int,
        seed: int,
        lanes: Sequence[int],
        mixture: Mixture | None = None,
        prefetch: int = 2,
        cache_bytes: int = CACHE_BYTES,
        long_dialogues: LongDialogues = "cut",
    ) -> None:
        datasets = [datasets] if isinstance(datasets, Dataset) else datasets
        for dataset in datasets:
            _check(dataset, split, seq_len, global_batch, lanes)
        self._lanes = np.asarray(lanes)
        self.seq_len, self.global_batch, self.seed, self.lanes = seq_len, global_batch, seed, lanes
        self._prefetch = prefetch
        self._mixture = mixture or Mixture([Phase(0, (CYCLE,))], seed)
        self._sources = [Source(dataset, split, seq_len, seed, cache_bytes, long_dialogues) for dataset in datasets]
        epoch_length = min(source.order.epoch_length for source in self._sources)
        self._at_once = max(1, min(AT_ONCE, epoch_length // global_batch))
        self._places = lru_cache(maxsize=2)(self._places_of)

    @property
    def sequences_per_epoch(self) -> int:
        """Of a lone dataset."""
        [source] = self._sources
        return source.order.epoch_length

    def batch(self, n: int) -> Batch:
        """This rank's lanes of global batch n: a pure function of n."""
        first = n * self.global_batch
        group, number = divmod(n, self._at_once)
        sources, shards, numbers = self._places(group)[:, number]
        if (sources == sources[0]).all():
            return _batch(self._sources[sources[0]].rows.rows(shards, numbers), first, n)
        rows = np.repeat(self._sources[0].rows.empty[:, None], len(sources), axis=1)
        for source in np.unique(sources).tolist():
            here = sources == source
            rows[:, here] = self._sources[source].rows.rows(shards[here], numbers[here])
        return _batch(rows, first, n)

    def _places_of(self, group: int) -> np.ndarray:
        """Where the lanes of that group of batches lie: source, shard and number in it, int64 [3, batches, B]."""
        batches = np.arange(group * self._at_once, (group + 1) * self._at_once)
        sources, indices = self._mixture.place((batches[:, None] * self.global_batch + self._lanes).flatten())
        places = np.stack([sources, np.empty_like(sources), np.empty_like(sources)])
        for source in np.unique(sources).tolist():
            here = sources == source
            found = self._sources[source].order.locate(indices[here])
            places[1, here], places[2, here] = found.shards, found.sequences
        return places.reshape(3, len(batches), -1)

    def find(self, position: int) -> Found:
        """The sequence at a position of the stream, whichever lane reads it."""
        (source,), (index,) = (found.tolist() for found in self._mixture.place(np.array([position])))
        return self._sources[source].find(source, index)

    def batches(self, start: int) -> Generator[Batch, None, None]:
        """Batches start, start + 1, …, read ahead by a thread that lives as long as the iterator.

        What the thread raises is raised here; closing or dropping the iterator ends the thread.
        """
        ready: queue.Queue[Batch | BaseException] = queue.Queue(max(1, self._prefetch))
        stop = threading.Event()

        def put(item: Batch | BaseException) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue

        def read() -> None:
            try:
                n = start
                while not stop.is_set():
                    put(self.batch(n))
                    n += 1
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=read, name="moray-prefetch", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()


def evaluation_batches(
    dataset: Dataset,
    split: str,
    *,
    seq_len: int,
    global_batch: int,
    lanes: Sequence[int],
    long_dialogues: LongDialogues = "cut",
) -> Iterator[Batch]:
    """The whole split once, in file order: equally many batches for every rank; lanes beyond the end are all masked.

    Raises UserError as `Stream` does.
    """
    _check(dataset, split, seq_len, global_batch, lanes)
    rows = rows_of(dataset, split, seq_len, 0 if dataset.kind == "text" else CACHE_BYTES, long_dialogues)
    return _evaluation_batches(rows, global_batch, lanes)


def _evaluation_batches(all_rows: Rows, global_batch: int, lanes: Sequence[int]) -> Iterator[Batch]:
    ends = np.cumsum(all_rows.counts)
    for step, first in enumerate(range(0, int(ends[-1]), global_batch)):
        positions = first + np.asarray(lanes)
        rows = np.repeat(all_rows.empty[:, None], len(lanes), axis=1)
        if (is_there := positions < ends[-1]).any():
            shards = np.searchsorted(ends, positions[is_there], side="right")
            numbers = positions[is_there] - (ends - all_rows.counts)[shards]
            rows[:, is_there] = all_rows.rows(shards, numbers)
        yield _batch(rows, first, step)


def _batch(rows: np.ndarray, first: int, step: int) -> Batch:
    """Of int64 [4, B, T], or [4, B, 2, T]."""
    tokens_BT, targets_BT, positions_BT, documents_BT = torch.from_numpy(rows)
    return Batch(tokens_BT, targets_BT, positions_BT, documents_BT, first, step)


def _check(dataset: Dataset, split: str, seq_len: int, global_batch: int, lanes: Sequence[int]) -> None:
    if split not in dataset.splits:
        raise UserError(f"split={split!r} is not in {dataset.folder}; it holds {sorted(dataset.splits)}")
    if seq_len < 1:
        raise UserError(f"seq_len={seq_len} must be at least 1")
    if global_batch < 1:
        raise UserError(f"global_batch={global_batch} must be at least 1")
    if not lanes or min(lanes) < 0 or max(lanes) >= global_batch:
        raise UserError(f"lanes={lanes} must be some of range({global_batch}), the lanes of the global batch")
