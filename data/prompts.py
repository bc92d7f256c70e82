"""What reinforcement learning iterates: prompts with what their answers are compared with, in the order of law 2.

Step n has the prompts at positions [nB, (n+1)B), which a mixture deals out to the sources, as of any other data; each
gives those of its prompts that leave room for an answer, in its own order, epoch after epoch.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np

from moray import UserError
from moray.data.blocks import CACHE_BYTES, BlockReader
from moray.data.dataset import Dataset
from moray.data.mixture import CYCLE, Mixture, Phase
from moray.data.order import Order
from moray.data.rows import padding
from moray.data.stream import Found


@dataclass(frozen=True)
class Prompt:
    """position: in the stream, whichever rank reads it; of an evaluation, in the split. tokens: int64, the beginning of
    the answer's turn included.
    """

    position: int
    key: str
    tokens: np.ndarray
    reference: Any


@dataclass(frozen=True)
class PromptBatch:
    """This rank's lanes of a step's prompts. first: the position of lane 0 of them all."""

    prompts: list[Prompt]
    first: int
    step: int


class Prompts:
    """The prompts of a split that have at most so many tokens, shard after shard.

    counts: int64 [shards]; n_left_out: those that are longer. Memory: 8 bytes a prompt, and a cache of blocks.
    Raises UserError where none is short enough.
    """

    def __init__(self, dataset: Dataset, split: str, most_tokens: int, cache_bytes: int = CACHE_BYTES) -> None:
        self._split, self._reader = dataset.splits[split], BlockReader(dataset, split, cache_bytes)
        lengths = [self._split.lengths(shard) for shard in range(len(self._split))]
        self._ends = [np.cumsum(of_shard, dtype=np.int64) for of_shard in lengths]
        self._fitting = [np.flatnonzero(of_shard <= most_tokens) for of_shard in lengths]
        self.counts = np.array([len(numbers) for numbers in self._fitting], np.int64)
        self.n_left_out = sum(map(len, lengths)) - int(self.counts.sum())
        self._block = lru_cache(maxsize=64)(self._reader.prompts)
        self._firsts = lru_cache(maxsize=8)(
            lambda shard: np.concatenate([[0], np.cumsum(self._split[shard].records["n_documents"])])
        )
        if not self.counts.sum():
            shortest = min(int(of_shard.min()) for of_shard in lengths if len(of_shard))
            raise UserError(
                f"no prompt of the {split} split of {dataset.called}={dataset.folder} has at most {most_tokens} tokens "
                f"(what train.seq_len leaves beside rl.max_new_tokens); the shortest has {shortest}"
            )

    def span(self, shard: int, number: int) -> tuple[int, int]:
        """Which of a shard's tokens the number-th prompt is, of those that are short enough."""
        document = int(self._fitting[shard][number])
        return int(self._ends[shard][document - 1]) if document else 0, int(self._ends[shard][document])

    def read(self, shard: int, number: int, position: int) -> Prompt:
        """That prompt. Raises UserError where the shard is damaged."""
        document, (start, end) = int(self._fitting[shard][number]), self.span(shard, number)
        firsts = self._firsts(shard)
        block = int(np.searchsorted(firsts, document, side="right")) - 1
        key, reference = self._block(shard, block)[document - int(firsts[block])]
        return Prompt(position, key, self._reader.read(shard, start, end)[0], reference)


class PromptStream:
    """An endless stream of the training prompts of a dataset, or of several that a mixture mixes: pure functions of
    (seed, position). Raises UserError as `Prompts` does.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        most_tokens: int,
        global_batch: int,
        seed: int,
        lanes: Sequence[int],
        mixture: Mixture | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._sources = [Prompts(dataset, "train", most_tokens, cache_bytes) for dataset in datasets]
        self._orders = [Order(source.counts, seed) for source in self._sources]
        self._mixture = mixture or Mixture([Phase(0, (CYCLE,))], seed)
        self._global_batch, self._lanes = global_batch, np.asarray(lanes)

    def batch(self, n: int) -> PromptBatch:
        """This rank's lanes of step n's prompts: a pure function of n."""
        first = n * self._global_batch
        positions = first + self._lanes
        sources, indices = self._mixture.place(positions)
        found = []
        for position, source, index in zip(positions.tolist(), sources.tolist(), indices.tolist(), strict=True):
            _, shard, number = self._locate(source, index)
            found.append(self._sources[source].read(shard, number, position))
        return PromptBatch(found, first, n)

    def find(self, position: int) -> Found:
        """The prompt at a position, as if it were a sequence that holds nothing else."""
        (source,), (index,) = (found.tolist() for found in self._mixture.place(np.array([position])))
        epoch, shard, number = self._locate(source, index)
        prompts = self._sources[source]
        tokens = prompts.read(shard, number, position).tokens
        row = padding(len(tokens), 0)
        row[0], row[2], row[3] = tokens, np.arange(len(tokens)), 0
        return Found(source, epoch, shard, number, [prompts.span(shard, number)], row)

    def _locate(self, source: int, index: int) -> tuple[int, int, int]:
        """Epoch, shard, and number among those of it that are short enough."""
        places = self._orders[source].locate(np.array([index]))
        return int(places.epochs[0]), int(places.shards[0]), int(places.sequences[0])

    def batches(self, start: int) -> Generator[PromptBatch, None, None]:
        """Those of steps start, start + 1, …"""
        return (self.batch(n) for n in count(start))


def evaluation_prompts(
    dataset: Dataset, most_tokens: int, limit: int, is_own: Callable[[int], bool] = lambda position: True
) -> list[Prompt]:
    """The first `limit` prompts of the validation split, in file order; of these, a rank's own.

    Raises UserError as `Prompts` does.
    """
    prompts = Prompts(dataset, "validation", most_tokens, 0)
    ends = np.cumsum(prompts.counts)
    found = []
    for position in range(min(int(ends[-1]), limit)):
        if is_own(position):
            shard = int(np.searchsorted(ends, position, side="right"))
            found.append(prompts.read(shard, position - int(ends[shard] - prompts.counts[shard]), position))
    return found
