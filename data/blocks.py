"""Reads a split's tokens by byte range: only the blocks asked for, checked against the index, in an LRU cache."""

import io
import json
import threading
import time
import zlib
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from typing import Any

import numpy as np
from fsspec.core import url_to_fs

from moray import UserError
from moray.data.dataset import Dataset
from moray.data.index import Extent, Sample, Shard

CACHE_BYTES = 256 << 20
RETRY_S = 0.5

FIRST = 128
"""Flag of a document's first token, beside those that `shards` writes."""


@dataclass(frozen=True)
class Block:
    """The tokens of some whole documents, and the flags of each."""

    tokens: np.ndarray  # uint16 or uint32 [tokens]
    flags: np.ndarray  # uint8 [tokens]

    @cached_property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.flags.nbytes


class BlockReader:
    """The shards of one split, each as one array of tokens that never stands in memory whole.

    Memory: blocks up to `cache_bytes` (256 MiB by default; at least the one being read).
    Any thread may read.
    """

    def __init__(self, dataset: Dataset, split: str, cache_bytes: int = CACHE_BYTES) -> None:
        self._folder = dataset.folder
        self._split = dataset.splits[split]
        self._fs, self._root = url_to_fs(dataset.folder)
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._cache: OrderedDict[tuple[int, int], Block] = OrderedDict()
        self._lock = threading.Lock()
        # Of more shards than a window of the order has; lists, as numpy takes longer to find one number in few.
        self._starts = lru_cache(maxsize=8)(lambda shard: self._split[shard].starts.tolist())

    def read(self, shard: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop) of a shard, cut at its end, and their flags; int64 and uint8. Raises as `rows` does."""
        tokens, flags, [length] = self.rows([shard], [start], stop - start)
        return tokens[0, :length].astype(np.int64), flags[0, :length]

    def rows(self, shards: list[int], begins: list[int], width: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """So many tokens of each of these shards from there on, their flags, and how many there are before its end.

        Shapes: uint32 and uint8 [rows, width]; behind a shard's end stands anything.
        Raises UserError naming shard, sample and byte where the file is not what the index says.
        """
        tokens, flags = np.empty(len(shards) * width, np.uint32), np.empty(len(shards) * width, np.uint8)
        lengths = []
        with self._lock:
            for row, (shard, begin) in enumerate(zip(shards, begins, strict=True)):
                starts = self._starts(shard)
                number, at, left = bisect_right(starts, begin) - 1, row * width, min(width, starts[-1] - begin)
                lengths.append(left)
                while left > 0:
                    block, offset = self._block(shard, number), begin - starts[number]
                    part = block.tokens[offset : offset + left]
                    end = at + len(part)
                    tokens[at:end], flags[at:end] = part, block.flags[offset : offset + left]
                    begin, left, number, at = begin + end - at, left + at - end, number + 1, end
        return tokens.reshape(-1, width), flags.reshape(-1, width), lengths

    def documents(self, shard: int, number: int) -> tuple[list[str], np.ndarray]:
        """The keys of a block's documents, and where each ends within it, int64 [documents]; its tokens are not read.

        Raises UserError as `read` does.
        """
        found = self._split[shard]
        sample = found.sample(number)
        (keys,) = self._names(found, sample, "documents")
        try:
            ends_npy = self._member(found, sample, sample.ends)
            ends = np.lib.format.read_array(io.BytesIO(ends_npy), allow_pickle=False)
        except ValueError as error:
            raise self._damage(found, sample, sample.ends.offset, f"no array of numbers ({error})") from None
        if len(ends) != len(keys):
            raise self._damage(found, sample, sample.ends.offset, "other documents than the index says")
        return keys, ends

    def prompts(self, shard: int, number: int) -> list[tuple[str, Any]]:
        """The keys of a block's prompts, each with what answers to it are compared with. Raises as `read` does."""
        found = self._split[shard]
        return [*zip(*self._names(found, found.sample(number), "documents", "references"), strict=True)]

    def _names(self, shard: Shard, sample: Sample, *lists: str) -> list[list[Any]]:
        try:
            content = json.loads(self._member(shard, sample, sample.json))
            named: list[list[Any]] = [content[name] for name in lists]
        except (ValueError, KeyError, TypeError) as error:
            raise self._damage(shard, sample, sample.json.offset, f"no list of documents ({error!r})") from None
        if any(len(names) != sample.n_documents for names in named):
            raise self._damage(shard, sample, sample.json.offset, "other documents than the index says")
        return named

    def _block(self, shard: int, number: int) -> Block:
        """With the lock held."""
        if (block := self._cache.get((shard, number))) is None:
            found = self._split[shard]
            block = self._load_patiently(found, found.sample(number))
            self._cache[shard, number] = block
            self._cached_bytes += block.nbytes
            while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        self._cache.move_to_end((shard, number))
        return block

    def _load_patiently(self, shard: Shard, sample: Sample) -> Block:
        try:
            return self._load(shard, sample)
        except UserError:  # shared storage may show a file late, or half of it: damage is what is there twice
            time.sleep(RETRY_S)
            return self._load(shard, sample)

    def _load(self, shard: Shard, sample: Sample) -> Block:
        parts = [sample.tokens, sample.ends, *([sample.mask] if sample.mask else [])]
        members = [self._member(shard, sample, extent) for extent in parts]
        if reduce(lambda crc, npy: zlib.crc32(npy, crc), members, 0) != sample.crc32:
            raise self._damage(shard, sample, sample.tokens.offset, "the checksum differs from the index")
        try:
            arrays = [np.lib.format.read_array(io.BytesIO(npy), allow_pickle=False) for npy in members]
        except ValueError as error:
            raise self._damage(shard, sample, sample.tokens.offset, f"no array of numbers ({error})") from None
        shapes = [(sample.n_tokens,), (sample.n_documents,), (sample.n_tokens,)]
        if [array.shape for array in arrays] != shapes[: len(arrays)]:
            raise self._damage(shard, sample, sample.tokens.offset, "arrays of other shapes than the index says")
        tokens, ends, flags = arrays if sample.mask else (*arrays, np.zeros(len(arrays[0]), np.uint8))
        flags[0] |= FIRST
        flags[ends[:-1]] |= FIRST
        return Block(tokens, flags)

    def _member(self, shard: Shard, sample: Sample, extent: Extent) -> bytes:
        try:
            data = self._fs.cat_file(f"{self._root}/{shard.name}", extent.offset, extent.offset + extent.length)
        except FileNotFoundError:
            raise self._damage(shard, sample, extent.offset, "the file is missing") from None
        if len(data) < extent.length:
            raise self._damage(shard, sample, extent.offset + len(data), "the file ends there")
        return data

    def _damage(self, shard: Shard, sample: Sample, byte: int, what: str) -> UserError:
        return UserError(
            f"{self._folder}/{shard.name}, sample {sample.key}, byte {byte}: {what}; "
            "restore the file from a copy, or run `moray prepare` again"
        )
