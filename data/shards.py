"""Writes documents as WebDataset shards whose bytes depend on their content alone (no times, no owners).

A sample is a block of whole documents of about 64K tokens, in three members of a plain tar:

    KEY.tokens.npy  uint16 or uint32 [tokens]     the documents' tokens, one after another
    KEY.ends.npy    int64 [documents]             where each ends (exclusive) within the block
    KEY.json        {"documents": [key, ...]}     which they are
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from moray.data.index import SAMPLE, SHARD, Extent, GrowingArray, Sample, Split, array_names, sample_key, shard_name

BLOCK_TOKENS = 1 << 16
SHARD_TOKENS = 16 << 20


class ShardFile:
    """A tar file written front to back by webdataset's own writer, hashed on the way."""

    def __init__(self, path: Path) -> None:
        self._file = _HashedFile(path)
        # Fixed times and owners: the bytes depend on the content alone.
        self._tar = TarWriter(self._file, user="", group="", mtime=0, compress=False, encoder=False)

    @property
    def size(self) -> int:
        return self._file.size

    def add(self, key: str, members: dict[str, bytes]) -> dict[str, Extent]:
        """Appends a sample; returns where each member's data lies."""
        extents, offset = {}, self._tar.tarstream.offset
        for name in sorted(members):  # the order in which TarWriter writes them
            extents[name] = Extent(offset + tarfile.BLOCKSIZE, len(members[name]))
            n_blocks = 1 + -(-len(members[name]) // tarfile.BLOCKSIZE)
            offset += n_blocks * tarfile.BLOCKSIZE
        self._tar.write({"__key__": key, **members})
        return extents

    def finish(self) -> str:
        """Ends the archive and flushes it to disk; returns its sha256."""
        self._tar.close()
        return self._file.finish()

    def close(self) -> None:
        """Gives the file up where it stands."""
        with suppress(OSError):  # a full disk is why it is given up: it cannot take the archive's end either
            self._tar.close()
        self._file.close()


class _HashedFile:
    """A file that knows the digest of what was written to it."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._file = open(path, "wb")  # noqa: SIM115
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._sha256.update(data)
        self.size += len(data)
        return len(data)

    def finish(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._file.close()


class SplitWriter:
    """Writes the documents of one split, in the order they come, into `folder/SPLIT-00000.tar` and so on.

    A block holds at most `block_tokens` and a shard at most `shard_tokens`, unless a single document is longer.
    Memory: one block.
    """

    def __init__(
        self, folder: Path, split: str, block_tokens: int = BLOCK_TOKENS, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._folder, self._split = folder, split
        self._block_tokens, self._shard_tokens = block_tokens, shard_tokens
        self._shard: ShardFile | None = None
        self._keys: list[str] = []
        self._block: list[np.ndarray] = []
        self._n_block = 0
        shards, samples = array_names(split)
        self._shards, self._samples = GrowingArray(folder / shards, SHARD), GrowingArray(folder / samples, SAMPLE)
        self._n_tokens = self._n_documents = self._n_samples = 0  # of the shard
        self.highest_id = 0  # of all tokens so far

    def add(self, key: str, tokens: np.ndarray) -> None:
        """Appends a document, start and EOS included, in the dtype to be stored."""
        self.highest_id = max(self.highest_id, int(tokens.max()))
        if self._block and self._n_block + len(tokens) > self._block_tokens:
            self._end_block()
        self._n_block += len(tokens)
        self._keys.append(key)
        self._block.append(tokens)

    def finish(self) -> Split:
        """Writes what is left and describes all of it."""
        if self._block:
            self._end_block()
        if self._shard:
            self._end_shard(self._shard)
        return Split(self._split, self._shards.finish(), self._samples.finish())

    def close(self) -> None:
        """Lets go of the open files, if writing was given up."""
        for file in (self._shard, self._shards, self._samples):
            if file:
                file.close()

    def _end_block(self) -> None:
        tokens = np.concatenate(self._block)
        ends = np.cumsum([len(document) for document in self._block], dtype=np.int64)
        if self._shard and self._n_tokens + len(tokens) > self._shard_tokens:
            self._end_shard(self._shard)
        name = shard_name(self._split, len(self._shards))
        if self._shard is None:
            self._shard = ShardFile(self._folder / name)
        tokens_npy, ends_npy = _npy(tokens), _npy(ends)
        names = json.dumps({"documents": self._keys}).encode()
        members = {"tokens.npy": tokens_npy, "ends.npy": ends_npy, "json": names}
        key = sample_key(name, self._n_samples)
        extents = self._shard.add(key, members)
        sample = Sample(
            key=key,
            n_tokens=len(tokens),
            n_documents=len(ends),
            tokens=extents["tokens.npy"],
            ends=extents["ends.npy"],
            json=extents["json"],
            crc32=zlib.crc32(ends_npy, zlib.crc32(tokens_npy)),
        )
        self._samples.append(sample.record)
        self._n_tokens, self._n_documents = self._n_tokens + len(tokens), self._n_documents + len(ends)
        self._n_samples += 1
        self._keys, self._block, self._n_block = [], [], 0

    def _end_shard(self, shard: ShardFile) -> None:
        sha256 = shard.finish().encode()
        self._shards.append((shard.size, sha256, self._n_tokens, self._n_documents, len(self._samples)))
        self._shard, self._n_tokens, self._n_documents, self._n_samples = None, 0, 0, 0


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
